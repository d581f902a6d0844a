"""The compiled decoder computes what the readable model computes, for every family and adapter."""

import copy
import dataclasses
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.models import CONFIGS, random_ids, tiny_model, train_a_little

from nanogpt_surgery import (
    GPTConfig,
    KVCache,
    SimpleGPT,
    SurgeryError,
    blend_lora,
    disable_lora,
    generate,
    inject_lora,
    merge_lora,
    undo_lora,
)
from nanogpt_surgery.errors import NotFiniteError
from nanogpt_surgery.generation.generate import next_logits
from nanogpt_surgery.generation.native.decoder import NativeDecoder, NativeSteps, unsupported_reason
from nanogpt_surgery.generation.native.library import (
    SOURCE,
    cache_folder,
    decoder_library,
)

LIBRARY, WHY_NOT = decoder_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=f"no compiled decoder: {WHY_NOT}")
LLAMA, GPT2 = CONFIGS["llama"], CONFIGS["gpt2"]
# Square projections: transposed, they are as large as before.
SQUARE = dataclasses.replace(LLAMA, head_dim=4)


def two(model):
    inject_lora(model, ["q_proj", "lm_head"], rank=2, name="one", tied="untie")
    inject_lora(model, ["q_proj", "down_proj"], rank=3, name="other", tied="untie")
    train_a_little(model)
    blend_lora(model, {"one": 0.7, "other": -0.4})


def every_linear(model):
    inject_lora(model, "all-linear", rank=5, alpha=7, tied="untie")
    train_a_little(model)


def switched_off(model):
    every_linear(model)
    disable_lora(model)


def merged(model):
    every_linear(model)
    merge_lora(model)


ADAPTERS = {
    "none": lambda model: None,
    "all linear": every_linear,
    "a blend of two": two,
    "disabled": switched_off,
    "merged": merged,
}


def stepped(model, ids, first, threads=2, dtype=torch.float32):
    """Logits (B, T, V) of ids (B, T), the first of them by PyTorch, the others a step each."""
    rows, tokens = ids.shape
    with torch.inference_mode():
        cache = KVCache(model.config, rows, tokens, dtype)
        parts = [model(ids[:, :first], cache).float()]
        assert unsupported_reason(model, cache) == ""
        decoder = NativeDecoder(model, cache, threads)
        parts += [decoder.step(ids[:, t : t + 1])[:, None] for t in range(first, tokens)]
    assert cache.length == tokens
    return torch.cat(parts, 1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_the_models(name, adapter, rows):
    model = tiny_model(CONFIGS[name])
    ADAPTERS[adapter](model)
    ids = random_ids(model.config, rows, 13)
    with torch.inference_mode():
        wanted = model(ids)
    found = stepped(model, ids, 4)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_from_the_first_token_on(name):
    model = tiny_model(CONFIGS[name])
    ids = random_ids(model.config, 2, 6)
    with torch.inference_mode():
        wanted = model(ids)
        cache = KVCache(model.config, 2)
        decoder = NativeDecoder(model, cache, 3)
        found = torch.stack([decoder.step(ids[:, t : t + 1]) for t in range(6)], 1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama-all-bias", "qwen3", "prev-tokens-relu2"])
def test_weights_in_bfloat16_lose_nothing_but_their_own_rounding(name):
    """It rounds weights and cache; PyTorch's bfloat16 rounds every result as well."""
    model = tiny_model(CONFIGS[name]).bfloat16()
    ids = random_ids(model.config, 2, 13)
    exact = copy.deepcopy(model).float()
    with torch.inference_mode():
        wanted, theirs = exact(ids), model(ids).float()
    found = stepped(model, ids, 4, dtype=torch.bfloat16)
    error, rounding = ((x - wanted)[:, 4:].norm() for x in (found, theirs))
    assert 0 < error < 1.2 * rounding


@pytest.mark.parametrize("seed", range(12))
def test_any_shape(seed):
    draw = torch.Generator().manual_seed(seed)

    def number(least, most):
        return int(torch.randint(least, most + 1, (), generator=draw))

    groups, head_dim = number(1, 4), 2 * number(1, 9)
    config = GPTConfig(
        number(1, 70), number(1, 50), groups * number(1, 3), number(1, 3), 24, groups, head_dim,
        number(1, 60), n_prev_tokens=seed % 4, qk_norm=seed % 5 == 1,
        positions=("learned", "rotary")[seed % 2], norm=("rmsnorm", "layernorm")[seed % 2],
        mlp=("swiglu", "relu2")[seed % 3 // 2],
    )  # fmt: skip
    model = tiny_model(config, seed)
    rows, threads = number(1, 5), number(1, 4)
    ids = random_ids(config, rows, 17)
    with torch.inference_mode():
        wanted = model(ids)
    torch.testing.assert_close(stepped(model, ids, 3, threads), wanted, rtol=1e-4, atol=1e-4)


def test_a_rows_bits_do_not_depend_on_its_companions_or_the_threads():
    model = tiny_model(LLAMA)
    every_linear(model)
    ids = random_ids(LLAMA, 4, 12)
    with torch.inference_mode():
        caches = [KVCache(LLAMA, 4), *(KVCache(LLAMA, 1) for _ in range(4))]
        together = NativeDecoder(model, caches[0], 2)
        alone = [NativeDecoder(model, cache, 3) for cache in caches[1:]]
        for t in range(12):
            logits = together.step(ids[:, t : t + 1])
            for row, decoder in enumerate(alone):
                assert torch.equal(decoder.step(ids[row : row + 1, t : t + 1])[0], logits[row])


def test_two_models_in_two_threads():
    models = [tiny_model(CONFIGS[name], 3) for name in ("llama", "gpt2")]
    prompts = [random_ids(m.config, 1, 5)[0].tolist() for m in models]
    pairs = list(zip(models, prompts, strict=True))
    wanted = [list(generate(model, prompt, 9, 0, engine="plain")) for model, prompt in pairs]
    found = [[], []]

    def write(number):
        for _ in range(20):
            ids = generate(models[number], prompts[number], 9, 0, engine="native")
            found[number].append(list(ids))

    threads = [threading.Thread(target=write, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[wanted[0]] * 20, [wanted[1]] * 20]


def greedy(model, engine, change=lambda: None, tokens=8):
    ids = []
    for index, new in enumerate(generate(model, [3, 1, 4], tokens, 0, engine=engine)):
        ids.append(new)
        if index == 3:
            torch.manual_seed(0)
            change()
    return ids


def in_place(model):
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight += 1.0


def by_data(model):
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0).contiguous()


def hooked(model):
    model.layers[1].register_forward_hook(lambda module, inputs, output: output.flip(-1))


def injected(model):
    inject_lora(model, ["o_proj", "lm_head"], rank=2, dora=True)
    train_a_little(model, size=1.0)


def transposed(model):
    for layer in model.layers:
        for linear in (layer.self_attn.o_proj, layer.self_attn.q_proj):
            linear.weight.data = linear.weight.data.t()


def other_angles(model):
    model.embed_positions.frequencies *= 3


def other_layers(model):
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


def other_norm(model):
    for layer in model.layers:
        layer.post_attention_layernorm.eps = 1.0


def no_final_norm(model):
    model.norm = torch.nn.Identity()


def no_gate(model):
    for layer in model.layers:
        layer.mlp.gate_proj = layer.mlp.up_proj


def hooked_everywhere(model):
    def flipped(module, inputs, output):
        return output.flip(-1) if module is model.layers[1].mlp.down_proj else output

    return torch.nn.modules.module.register_module_forward_hook(flipped)


CHANGES = {
    "in place": in_place,
    "the same memory, transposed": transposed,
    "other rotary frequencies": other_angles,
    "layers in another order": other_layers,
    "another eps": other_norm,
    "no final norm": no_final_norm,
    "a layer twice": no_gate,
    "another tensor": by_data,
    "a hook": hooked,
    "all linear": every_linear,
    "DoRA": injected,
    "undo": undo_lora,
    "another attention": lambda m: setattr(m.layers[0].self_attn, "attend", lambda q, k, v, *_: q),
}


def logits_after(model, native, change=lambda model: None):
    """Of the third token after a prompt, the change made before it."""
    cache, ids = KVCache(model.config), [3, 1, 4]
    steps = NativeSteps(model, cache) if native else None
    for new in (1, 5):
        next_logits(model, ids, cache, steps)
        ids.append(new)
    torch.manual_seed(0)
    change(model)
    return next_logits(model, ids, cache, steps)


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_never_stale(change):
    """Whatever happens to the model between two tokens is seen by the next."""
    config, found = SQUARE if change == "the same memory, transposed" else LLAMA, []
    prepare = every_linear if change == "undo" else lambda model: None
    for native in (False, True):
        model = tiny_model(config)
        prepare(model)
        found.append(logits_after(model, native, CHANGES[change]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=3e-5)
    model = tiny_model(config)
    prepare(model)
    assert (logits_after(model, False) - found[0]).abs().max() > 1e-3


def test_a_hook_on_all_modules_is_seen():
    model = tiny_model(LLAMA)
    handle = hooked_everywhere(model)
    try:
        wanted, found = (greedy(model, engine) for engine in ("plain", "auto"))
    finally:
        handle.remove()
    assert found == wanted != greedy(model, "plain")


def test_another_activation_is_seen():
    model = tiny_model(CONFIGS["gpt2"])
    for layer in model.layers:
        layer.mlp.activation = torch.cos
    assert greedy(model, "auto") == greedy(model, "plain") != greedy(tiny_model(GPT2), "plain")
    assert "activation" in unsupported_reason(model, KVCache(GPT2))


@pytest.mark.parametrize(("into", "of"), [("llama", "gpt2"), ("gpt2", "llama")])
def test_another_familys_feed_forward_is_seen(into, of):
    """Of the same sizes, so that the activation alone tells them apart."""
    model = tiny_model(CONFIGS[into])
    other = tiny_model(dataclasses.replace(CONFIGS[of], n_inner=model.config.n_inner))
    for layer, another in zip(model.layers, other.layers, strict=True):
        layer.mlp = another.mlp
    assert "activation" in unsupported_reason(model, KVCache(model.config))
    assert greedy(model, "auto") == greedy(model, "plain")


def test_a_copy_of_a_model_is_computed_too():
    assert unsupported_reason(copy.deepcopy(tiny_model(GPT2)), KVCache(GPT2)) == ""


def test_what_it_does_not_compute_is_plain_or_refused():
    model = tiny_model(LLAMA)
    hooked(model)
    cache = KVCache(LLAMA)
    assert "layers.1" in unsupported_reason(model, cache)
    assert not NativeSteps(model, cache).can_step()
    with pytest.raises(SurgeryError, match=r"layers\.1"):
        list(generate(model, [1], 2, engine="native"))


def test_past_the_block_the_window_slides_as_it_did():
    model = tiny_model(LLAMA)
    with pytest.warns(UserWarning, match="slides"):
        wanted = list(generate(model, [5, 2], 30, 0, engine="plain"))
    with pytest.warns(UserWarning, match="slides"):
        assert list(generate(model, [5, 2], 30, 0, engine="native")) == wanted


def test_nothing_is_written_past_the_caches_end():
    model = tiny_model(LLAMA)
    cache = KVCache(LLAMA, 1, 6)
    around = torch.full((3, *cache.layers[-1].keys.shape), 7.0)
    cache.layers[-1].keys = around[1]
    ids = random_ids(LLAMA, 1, 6)
    with torch.inference_mode():
        decoder = NativeDecoder(model, cache)
        for t in range(6):
            decoder.step(ids[:, t : t + 1])
        with pytest.raises(SurgeryError, match="6"):
            decoder.step(ids[:, :1])
    assert bool((around[0] == 7).all() and (around[2] == 7).all())


def test_a_gpt_from_nothing():
    model = SimpleGPT(11, 8, 2, 1, 10)
    assert len(list(generate(model, [1], 9, seed=3, engine="native"))) == 9


def larger_head(model):
    model.lm_head = torch.nn.Linear(24, 5000, bias=False)


def smaller_table(model):
    model.embed_tokens = torch.nn.Embedding(7, 24)


def fewer_layers(model):
    model.layers = model.layers[:1]


def wider_inside(model):
    model.layers[1].mlp.up_proj = torch.nn.Linear(24, 900)


def no_weight(model):
    model.norm = torch.nn.LayerNorm(24, elementwise_affine=False)


def longer_factors(model):
    every_linear(model)
    layer = model.layers[0].mlp.up_proj
    layer.updates["default"].lora_A = torch.nn.Parameter(torch.randn(4000, 24))


def a_plain_tensor(model):
    linear = model.layers[0].mlp.up_proj
    weight = linear.weight.detach().double()
    del linear.weight
    linear.weight = weight


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (larger_head, "lm_head"),
        (smaller_table, "embed_tokens"),
        (fewer_layers, "layers"),
        (wider_inside, r"layers\.1\.mlp\.up_proj"),
        (no_weight, "norm"),
        (longer_factors, r"layers\.0\.mlp\.up_proj"),
        (a_plain_tensor, r"layers\.0\.mlp\.up_proj"),
    ],
)
def test_other_shapes_than_the_configs_are_refused(change, named):
    """C would read or write past the end of a buffer."""
    model = tiny_model(LLAMA)
    change(model)
    with pytest.raises(SurgeryError, match=named):
        generate(model, [1], 2, engine="native")


def test_a_table_of_previous_tokens_too_many_is_refused():
    model = tiny_model(CONFIGS["prev-tokens-relu2"])
    n = model.config.n_prev_tokens
    model.embed_prev_tokens.append(torch.nn.Embedding(3, 2))
    with pytest.raises(SurgeryError, match=f"{n + 1} tables, not {n}"):
        generate(model, [1], 2, engine="native")


@pytest.mark.parametrize("other", ["gpt2", "more layers", "longer", "float64"])
def test_a_cache_of_another_model_is_refused(other):
    cache = {
        "gpt2": lambda: KVCache(GPT2),
        "more layers": lambda: KVCache(GPTConfig(53, 24, 6, 3, 19, 2, 10)),
        "longer": lambda: KVCache(GPTConfig(53, 24, 3, 2, 500)),
        "float64": lambda: KVCache(GPT2, dtype=torch.float64),
    }[other]()
    model = tiny_model(GPT2 if other in ("longer", "float64") else LLAMA)
    with pytest.raises(SurgeryError, match="cache"):
        generate(model, [1], 2, cache=cache, engine="native")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype):
    """The logits are float32 whatever it is: with bfloat16 there would be room for half of them."""
    model = tiny_model(LLAMA)
    ids = random_ids(LLAMA, 1, 6)
    wanted = stepped(model, ids, 1)
    torch.set_default_dtype(dtype)
    try:
        found = stepped(model, ids, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("wrong", [-1, 53, 1 << 40])
def test_an_id_outside_the_vocabulary_is_refused(wrong):
    decoder = NativeDecoder(tiny_model(LLAMA), KVCache(LLAMA))
    with pytest.raises(SurgeryError, match="53"):
        decoder.step(torch.tensor([[wrong]]))
    assert decoder.cache.length == 0


@pytest.mark.parametrize("name", ["gpt2", "gpt2-gelu-untied", "llama", "prev-tokens-relu2"])
@pytest.mark.parametrize("part", ["layers.0.mlp.up_proj", "layers.1.self_attn.v_proj", "norm"])
def test_a_logit_that_is_no_number_is_traced_to_its_module(name, part):
    def damaged(model):
        with torch.no_grad():
            model.get_parameter(f"{part}.weight").view(-1)[5] = torch.nan

    errors = []
    for engine in ("plain", "native"):
        model = tiny_model(CONFIGS[name])
        with pytest.raises(NotFiniteError, match=part) as caught:
            greedy(model, engine, lambda model=model: damaged(model))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_the_weights_live_as_long_as_the_decoder():
    def decoder():
        return NativeDecoder(tiny_model(LLAMA), KVCache(LLAMA), 2)

    ids = random_ids(LLAMA, 1, 1)
    model = tiny_model(LLAMA)
    with torch.inference_mode():
        wanted = model(ids)[:, 0]
    alone = decoder()
    gc.collect()
    [torch.full((53, 24), 9.0) for _ in range(200)]  # over what was freed
    torch.testing.assert_close(alone.step(ids), wanted, rtol=1e-4, atol=3e-5)


def in_child(act, seconds=300):
    """The exit status of a forked process that does something: 0 if it ends well and in time."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "it hangs"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_goes_on_alone():
    """The threads of the pool are not in the child."""
    ids = random_ids(LLAMA, 1, 3)
    decoder = NativeDecoder(tiny_model(LLAMA), KVCache(LLAMA), 3)
    decoder.step(ids[:, :1])
    wanted = decoder.step(ids[:, 1:2])
    decoder.cache.truncate(1)

    def act():
        assert torch.equal(decoder.step(ids[:, 1:2]), wanted)
        LIBRARY.pool_free(decoder.pool)

    assert in_child(act) == 0
    assert torch.equal(decoder.step(ids[:, 1:2]), wanted)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fewer_threads_where_the_system_gives_no_more():
    model, ids = tiny_model(LLAMA), random_ids(LLAMA, 1, 1)
    wanted = NativeDecoder(model, KVCache(LLAMA), 1).step(ids)
    cache = KVCache(LLAMA)

    def act():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + (4 << 20)  # no room for a stack of 8 MB
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        decoder = NativeDecoder(model, cache, 4)
        assert torch.equal(decoder.step(ids), wanted)

    assert in_child(act) == 0


def test_the_number_of_threads_follows_pytorchs():
    model, cache = tiny_model(LLAMA), KVCache(LLAMA)
    steps, before = NativeSteps(model, cache), torch.get_num_threads()
    try:
        counts = []
        for count in (1, 3):
            torch.set_num_threads(count)
            assert steps.can_step()
            counts.append(steps.decoder.threads)
    finally:
        torch.set_num_threads(before)
    assert counts == [1, 3]


def test_an_interrupted_step_leaves_the_cache_as_it_was():
    """Ctrl-C between two layers: the first holds a token more than the last."""
    model, cache = tiny_model(LLAMA), KVCache(LLAMA)
    ids = random_ids(LLAMA, 1, 5)

    def interrupt(module, inputs):
        raise KeyboardInterrupt

    with torch.inference_mode():
        wanted = model(ids)[:, -1]
        model(ids[:, :4], cache)
        handle = model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 4:], cache)
        handle.remove()
        assert cache.length == 4
        cache.truncate(4)
        found = NativeDecoder(model, cache).step(ids[:, 4:])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=3e-5)


# ---- the library ----


def fresh_library():
    """What another process would load."""
    return decoder_library.__wrapped__()


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.filterwarnings("ignore:the decoder was compiled")
def test_it_is_compiled_once_and_a_broken_file_anew(cache_home, tmp_path, monkeypatch):
    assert fresh_library()[1] == ""
    [file] = cache_folder().iterdir()
    made = file.stat().st_mtime_ns
    assert fresh_library()[1] == "" and file.stat().st_mtime_ns == made
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    cache_folder().mkdir(parents=True)
    broken = cache_folder() / file.name
    broken.write_bytes(b"half of it")
    assert fresh_library()[1] == ""
    assert list(cache_folder().iterdir()) == [broken] and broken.stat().st_size > 1000


@pytest.mark.filterwarnings("ignore:the decoder was compiled")
def test_several_compile_at_once(cache_home):
    found = []
    threads = [threading.Thread(target=lambda: found.append(fresh_library())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [why for _, why in found] == [""] * 3
    assert len(list(cache_folder().iterdir())) == 1


def test_without_a_home_folder_the_plain_path_is_taken(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as for a uid without a name
    library, why = fresh_library()
    assert library is None and "home" in why


def test_where_nothing_can_be_written_the_plain_path_is_taken(cache_home):
    cache_home.write_text("a file where the folder should be")
    library, why = fresh_library()
    assert library is None and "cache" in why


@pytest.mark.filterwarnings("ignore:the decoder was compiled")
@pytest.mark.parametrize("named", ["no-such-compiler", "true", "ls", "   ", "cc -fno-such-flag"])
def test_nonsense_in_cc(cache_home, monkeypatch, named):
    monkeypatch.setenv("CC", named)
    library, why = fresh_library()
    assert (library is None) == bool(why)
    assert (library is None) == (named.split()[:1] not in ([], ["no-such-compiler"]))


@pytest.mark.parametrize(
    "target",
    ["x86_64-linux-gnu -mcpu=x86_64", "x86_64-linux-gnu -mcpu=sapphirerapids", "aarch64-linux-gnu"],
)
def test_it_compiles_for_other_processors(tmp_path, target):
    command = [sys.executable, "-m", "ziglang", "cc", "-std=c11", "-O0", "-Werror", "-target"]
    command += [*target.split(), "-c", str(SOURCE), "-o", str(tmp_path / "decoder.o")]
    done = subprocess.run(command, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_sanitizers_find_nothing(tmp_path, sanitizers):
    if not shutil.which("gcc"):
        pytest.skip("no gcc, whose sanitizers are used")
    program = tmp_path / "program"
    flags = ["-std=c11", "-g", "-O1", "-march=native", "-fno-sanitize-recover=all"]
    source = Path(__file__).with_name("decoder_sanitized.c")
    command = ["gcc", *flags, f"-fsanitize={sanitizers}", f'-DDECODER="{SOURCE}"', str(source)]
    subprocess.run([*command, "-o", str(program), "-lm", "-lpthread"], check=True)
    done = subprocess.run([program], capture_output=True, timeout=300)
    assert (done.returncode, done.stderr.decode()) == (0, "")
