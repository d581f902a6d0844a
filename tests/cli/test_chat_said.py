"""What `surgery chat` answers to what it cannot do."""


def test_a_message_that_is_refused_uses_no_seed(talk) -> None:
    _, errors = talk("x" * 500 + "\n/set\n")
    assert "the message has" in errors
    assert "/set max_new_tokens 8" in errors
    assert "  seed 3\n" in errors


def test_settings_and_commands_are_named_as_they_are_typed(talk) -> None:
    _, errors = talk("/set temp 1\n/set top_k\n/lod\n/qqqq\n/set\n")
    for written, hint in (
        ("'temp'", "temperature? /set"),
        ("'top_k'", "/set top_k"),
        ("/lod", "/load? /help"),
        ("/qqqq", "/help"),
    ):
        said = errors[errors.index(f"{written}") :].split("\n")
        assert said[1].startswith(f"  → {hint} "), written
    assert "  top_k off\n" in errors
