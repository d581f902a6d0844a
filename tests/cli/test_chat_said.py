"""What `surgery chat` answers to what it cannot do."""


def test_a_message_that_is_refused_uses_no_seed(talk) -> None:
    _, errors = talk("x" * 500 + "\n/set\n")
    assert "the message has" in errors
    assert "/set max_new_tokens 8" in errors
    assert "  seed 3\n" in errors


def test_settings_and_commands_are_named_as_they_are_typed(talk) -> None:
    _, errors = talk("/set temp 1\n/set top_k\n/lod\n/qqqq\n/set\n")
    assert "there is no setting 'temp'\n  → temperature? /set lists them\n" in errors
    assert "'top_k' needs a value\n  → /set top_k VALUE\n" in errors
    assert "there is no command /lod\n  → /load? /help lists them\n" in errors
    assert "there is no command /qqqq\n  → /help lists them\n" in errors
    assert "  top_k off\n" in errors
