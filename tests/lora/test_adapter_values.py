"""What stands in an adapter folder's JSON files is of its kind, or is refused by name."""

import json

import pytest
from helpers.adapters import adapted, change_config, unsealed
from helpers.models import FAMILY_CONFIGS, tiny_model
from test_adapter_refusals import CONFIG, LLAMA, assert_refused

from nanogpt_surgery import load_adapter, save_adapter

Q_PROJ = "model.layers.0.self_attn.q_proj"
WRONG_OPTIONS = {
    "alpha as text": ({"lora_alpha": "16"}, "lora_alpha is '16'; it must be a number"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is None; it must be a number"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha is 0; it must be a number other than 0"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha is nan; it must be"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "lora_alpha is inf; it must be"),
    "alpha beyond floats": ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    "a list of patterns": (
        {"alpha_pattern": ["q"]},
        r"alpha_pattern is \['q'\]; it must be a table",
    ),
    "no expression": ({"alpha_pattern": {"*q": 4}}, r"'\*q' is not a regular expression"),
    "flags inside": ({"alpha_pattern": {"(?i)q": 4}}, "is not a regular expression"),
    "a pattern's alpha": ({"alpha_pattern": {"q": "4"}}, "alpha_pattern of 'q' is '4'"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout is 1.5; it must be"),
    "a switch": ({"use_rslora": "no"}, "use_rslora is 'no'; it must be true or false"),
    "modules as text": ({"modules_to_save": "norm"}, "modules_to_save is 'norm'; it must be"),
    "nameless modules": ({"modules_to_save": [""]}, "must be null or a list"),
}


@pytest.mark.parametrize(("options", "match"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_a_value_in_the_config_that_is_not_of_its_kind_is_refused(options, match, tmp_path):
    save_adapter(adapted(LLAMA), tmp_path / "adapter")
    change_config(unsealed(tmp_path / "adapter"), **options)
    message = assert_refused(tmp_path / "adapter", match)
    assert str(tmp_path / "adapter" / CONFIG) in message
    assert "→ restore it from a copy" in message


def test_all_such_values_are_told_at_once(tmp_path):
    save_adapter(adapted(LLAMA), tmp_path / "adapter")
    wrong = {"lora_alpha": "x", "use_dora": 3, "alpha_pattern": {"*": None}, "lora_dropout": -1}
    change_config(unsealed(tmp_path / "adapter"), **wrong)
    message = assert_refused(tmp_path / "adapter", "is damaged")
    assert all(key in message for key in wrong)
    (tmp_path / "adapter" / CONFIG).write_text("[]", "utf-8")
    assert_refused(tmp_path / "adapter", "holds no table")


@pytest.mark.parametrize(
    "contents",
    [
        [],
        {"fingerprint": 5},
        {"fingerprint": {Q_PROJ: 5}},
        {"tied": "yes"},
        {"tied": ["both"]},
        {"births": []},
        {"births": {Q_PROJ: 5}},
        {"births": {Q_PROJ: [1]}},
        {"births": {Q_PROJ: ["a", 1.0]}},
        {"births": {Q_PROJ: [True, 1.0]}},
        {"births": {Q_PROJ: [1, float("nan")]}},
        {"births": {Q_PROJ: [3, 5]}},
        {"pieces": {Q_PROJ: "ab"}},
        {"pieces": {Q_PROJ: ["ab"]}},
        {"pieces": {Q_PROJ: [[3, 5]]}},
        {"pieces": {Q_PROJ: [[3, 5, [3, 5]]]}},
        {"pieces": {Q_PROJ: [[2, 5, None], None]}},
    ],
    ids=str,
)
def test_a_damaged_file_of_ours_is_refused_and_a_missing_one_is_not(contents, tmp_path):
    save_adapter(adapted(LLAMA), tmp_path / "adapter")
    (unsealed(tmp_path / "adapter") / "surgery.json").write_text(json.dumps(contents), "utf-8")
    assert "→" in assert_refused(tmp_path / "adapter", "surgery.json")
    (tmp_path / "adapter" / "surgery.json").unlink()
    load_adapter(tiny_model(LLAMA), tmp_path / "adapter")


def test_all_that_is_wrong_in_a_file_of_ours_is_told_at_once(tmp_path):
    save_adapter(adapted(LLAMA), tmp_path / "adapter")
    wrong = {"tied": 1, "births": {Q_PROJ: 5}, "pieces": 7, "fingerprint": {Q_PROJ: None}}
    (unsealed(tmp_path / "adapter") / "surgery.json").write_text(json.dumps(wrong), "utf-8")
    message = assert_refused(tmp_path / "adapter", "surgery.json is damaged")
    assert all(key in message for key in wrong)


def test_pieces_of_another_number_than_the_matrix_has_parts_are_refused(tmp_path):
    config = FAMILY_CONFIGS["gpt2"]
    save_adapter(adapted(config, ["q_proj", "v_proj"]), tmp_path / "adapter")
    path = unsealed(tmp_path / "adapter") / "surgery.json"
    extras = json.loads(path.read_text("utf-8"))
    extras["pieces"]["transformer.h.0.attn.c_attn"] = [[6, 10.0, None]]
    path.write_text(json.dumps(extras), "utf-8")
    assert_refused(tmp_path / "adapter", "3 parts .* put together from 1", tiny_model(config))
