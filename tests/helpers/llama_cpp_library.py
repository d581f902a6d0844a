"""llama.cpp's own functions, in the library that the package xllamacpp carries.

Its Python interface has no control vectors. Structures whose fields are not needed are room for as
many bytes; what C++ passes, a vector and a string of libstdc++, is laid out by hand.
"""

import ctypes
from ctypes import POINTER, c_char, c_char_p, c_float, c_int32, c_size_t, c_void_p

import pytest
import torch

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (xllamacpp)")

OLD_STRING = "_Z14common_get_envRKSs"  # is only there with libstdc++'s older string
LOAD = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"


class Params(ctypes.Structure):
    """The defaults of a model or of a context, whatever they are."""

    _fields_ = [("room", c_char * 1024)]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [("n_tokens", c_int32), ("rest", c_void_p * 6)]


class Vector(ctypes.Structure):
    """std::vector."""

    _fields_ = [("begin", c_void_p), ("end", c_void_p), ("room", c_void_p)]


class LoadInfo(ctypes.Structure):
    """common_control_vector_load_info: a strength, and the pointer that a std::string begins with.

    In the older of libstdc++'s two strings there is nothing else.
    """

    _fields_ = [("strength", c_float), ("name", c_void_p)]


class NewLoadInfo(LoadInfo):
    """The same with the newer string."""

    _fields_ = [("length", c_size_t), ("local", c_char * 16)]


class Data(ctypes.Structure):
    """common_control_vector_data: the width, and the numbers of blocks 1, 2, … in a row."""

    _fields_ = [("n_embd", c_int32), ("data", Vector)]


def _library():
    library = ctypes.CDLL(str(next(xllamacpp_files())))
    if not hasattr(library, LOAD) or not hasattr(library, "llama_set_adapter_cvec"):
        pytest.skip("this build of xllamacpp does not show llama.cpp's own functions")
    for name, result, arguments in (
        ("llama_model_default_params", Params, []),
        ("llama_context_default_params", Params, []),
        ("llama_model_load_from_file", c_void_p, [c_char_p, Params]),
        ("llama_init_from_model", c_void_p, [c_void_p, Params]),
        ("llama_set_n_threads", None, [c_void_p, c_int32, c_int32]),
        ("llama_batch_get_one", Batch, [POINTER(c_int32), c_int32]),
        ("llama_decode", c_int32, [c_void_p, Batch]),
        ("llama_get_logits_ith", POINTER(c_float), [c_void_p, c_int32]),
        ("llama_free", None, [c_void_p]),
        ("llama_model_free", None, [c_void_p]),
        ("llama_set_adapter_cvec", c_int32,
         [c_void_p, c_void_p, c_size_t, c_int32, c_int32, c_int32]),
        (LOAD, Data, [POINTER(Vector)]),
    ):  # fmt: skip
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def xllamacpp_files():
    from pathlib import Path

    return Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")


def loaded_control_vector(path, strength=1.0):
    """What llama.cpp reads from a control vector's file: its width, and a row for blocks 1, 2, …"""
    library, name = _library(), str(path).encode()
    text = ctypes.create_string_buffer(name)
    kind = LoadInfo if hasattr(library, OLD_STRING) else NewLoadInfo
    info = kind(strength, ctypes.addressof(text))
    if kind is NewLoadInfo:
        info.length = len(name)
    start = ctypes.addressof(info)
    end = start + ctypes.sizeof(info)
    data = getattr(library, LOAD)(ctypes.byref(Vector(start, end, end)))
    if data.n_embd == -1:
        return None
    count = (data.data.end - data.data.begin) // 4
    numbers = torch.tensor((c_float * count).from_address(data.data.begin))
    return numbers.view(-1, data.n_embd)


def last_logits(path, ids, vocab_size, control=None):
    """llama.cpp's logits after ids, with the rows of a control vector added."""
    library = _library()
    model = library.llama_model_load_from_file(
        str(path).encode(), library.llama_model_default_params()
    )
    context = library.llama_init_from_model(model, library.llama_context_default_params())
    try:
        library.llama_set_n_threads(context, 1, 1)
        if control is not None:
            numbers = (c_float * control.numel())(*control.flatten().tolist())
            width, count = control.size(1), len(control)
            failed = library.llama_set_adapter_cvec(context, numbers, len(numbers), width, 1, count)
            assert not failed
        tokens = (c_int32 * len(ids))(*ids)
        assert library.llama_decode(context, library.llama_batch_get_one(tokens, len(ids))) == 0
        return torch.tensor(library.llama_get_logits_ith(context, -1)[:vocab_size])
    finally:
        library.llama_free(context)
        library.llama_model_free(model)
