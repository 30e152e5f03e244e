"""The wire, with the safetensors library as the judge of frames and loopback TCP as the line.

python -m pytest tests/test_protocol.py
"""

import concurrent.futures
import contextlib
import gc
import hashlib
import itertools
import json
import math
import os
import random
import re
import select
import socket
import struct
import time
import tracemalloc
import weakref

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import DEADLINE, rounded, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trail import places

import protocol
from protocol import (
    CHUNK,
    CODECS,
    DTYPES,
    MAX_HEADER_BYTES,
    Connection,
    Message,
    Payload,
    ProtocolError,
    Refused,
    TensorSpec,
    encode_header,
    load_file,
    memory,
)

# Files of examples are overwritten, so that one folder serves for all.
once = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SHAPES = [(3, 4), (), (0, 5), (7,), (1, 2, 3)]


def random_bits(dtype, shape, seed=0):
    """A tensor of any bits, NaN and denormals among them."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    size = (math.prod(shape) * dtype.itemsize,)
    raw = torch.randint(0, high, size, dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same(ours, theirs):
    """Equal names, dtypes, shapes and bits."""
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(ours[name]) == bits(tensor), name


def frame(header, payload=b""):
    """A frame by hand, for headers that encode_header would not write."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + payload


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def payload(tensors):
    return b"".join(bytes(memory(tensor)) for tensor in tensors)


@contextlib.contextmanager
def allocates_under(limit):
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit


# --- Frames against the safetensors library -------------------------------------------------


def test_every_dtype_and_shape_is_read_by_the_library_and_back(tmp_path):
    tensors = {
        f"{name}{list(shape)}": random_bits(dtype, shape, seed)
        for seed, (name, dtype) in enumerate(DTYPES.items())
        for shape in SHAPES
    }
    specs = protocol.specs_of(tensors.items())
    header = encode_header({}, specs)
    assert len(header) % 8 == 0
    (tmp_path / "raw").write_bytes(header + payload(tensors.values()))
    assert_same(safetensors.torch.load_file(tmp_path / "raw"), tensors)
    safetensors.torch.save_file(tensors, tmp_path / "theirs")
    assert_same(load_file(tmp_path / "theirs")[1], tensors)
    protocol.save_file(tmp_path / "ours", tensors)
    assert_same(load_file(tmp_path / "ours")[1], tensors)


NAMES = st.text(max_size=12).filter(lambda name: name != "__metadata__")
TENSORS = st.dictionaries(
    NAMES,
    st.builds(
        random_bits,
        st.sampled_from(list(DTYPES.values())),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
        st.integers(0, 99),
    ),
    max_size=6,
)
VALUES = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.text(max_size=9)
VALUES |= st.floats(allow_nan=False, allow_infinity=False) | st.lists(st.text(max_size=3))


@once
@given(TENSORS, st.dictionaries(st.text(max_size=9), VALUES, max_size=4))
def test_round_trip(tmp_path, tensors, fields):
    specs = protocol.specs_of(tensors.items())
    header = encode_header(fields, specs)
    assert protocol.header_length(header[:8]) == len(header) - 8
    assert protocol.parse_header(header[8:]) == (fields, specs)
    raw = header + payload(tensors.values())
    (tmp_path / "f").write_bytes(raw)
    assert_same(safetensors.torch.load_file(tmp_path / "f"), tensors)
    read, loaded = load_file(tmp_path / "f")
    assert read == fields
    assert_same(loaded, tensors)
    safetensors.torch.save_file(tensors, tmp_path / "f", {"format": "pt"})
    assert_same(load_file(tmp_path / "f")[1], tensors)


def test_the_library_opens_our_file_with_its_metadata(tmp_path):
    strided = torch.arange(12.0).view(3, 4).t()
    tensors = {"ä": strided, "p": torch.nn.Parameter(torch.ones(2))}
    protocol.save_file(tmp_path / "f", tensors, {"round": 3})
    with safetensors.safe_open(tmp_path / "f", "pt") as file:
        assert file.metadata() == {"format": "pt", "diloco": '{"round": 3}'}
        assert_same({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118
    fields, loaded = load_file(tmp_path / "f")
    assert fields == {"round": 3}
    loaded["p"].fill_(7)  # the mapped file is private to this process
    assert_same(load_file(tmp_path / "f")[1], tensors)


def test_files_of_other_programs_have_any_order_and_alignment(tmp_path):
    z, a = random_bits(torch.uint8, (3,)), random_bits(torch.float64, (2,))
    e, b = torch.empty(0), random_bits(torch.bfloat16, (5,))
    header = {
        "a": entry("F64", (2,), (3, 19)),
        "b": entry("BF16", (5,), (19, 29)),
        "z": entry("U8", (3,), (0, 3)),
        "e": entry("F32", (0,), (3, 3)),
    }
    raw = frame(header, payload([z, a, b]))
    (tmp_path / "f").write_bytes(raw)
    assert_same(load_file(tmp_path / "f")[1], {"z": z, "a": a, "b": b, "e": e})
    assert_same(safetensors.torch.load(raw), {"z": z, "a": a, "b": b, "e": e})
    with pytest.raises(ProtocolError, match="in order"):  # the wire is stricter
        protocol.parse_header(raw[8:-29])


def test_what_the_library_refuses_is_refused(tmp_path):
    tensors = {"é": torch.rand(2, 3), "b": torch.rand(10).bfloat16(), "c": torch.tensor(True)}
    header = encode_header({"step": 10}, protocol.specs_of(tensors.items()), format="pt")
    whole = header + payload(tensors.values())
    chance, path, accepted = random.Random(0), tmp_path / "f", 0
    for _ in range(400):
        raw, at = bytearray(whole), chance.randrange(len(header))
        kind = chance.randrange(8)
        if kind == 0:
            del raw[chance.choice([at, len(whole) - 1]) :]
        elif kind == 1:
            raw[at] ^= 1 << chance.randrange(8)
        else:  # a character that means something to JSON gets further than a random bit
            raw[at] = chance.choice(b'"{}[],:\\ 0123456789-+.eEdDuFB\x00\xff')
        path.write_bytes(raw)
        try:
            ours = load_file(path)[1]
        except ProtocolError:
            continue
        accepted += 1
        with safetensors.safe_open(path, "pt") as file:
            assert_same(ours, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert 20 < accepted < 200


@pytest.mark.parametrize(
    "header, size",
    [
        (rb'{"\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
        (rb'{"__metadata__":{"a":"\ud800"}}', 0),  # half of a pair of surrogates
        ({"a": entry(shape=[1 << 52, 1 << 52, 0], offsets=[0, 0])}, 0),
        (b'{"a\n":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    ],
    ids=["name", "metadata", "shape", "control"],
)
def test_rare_rules_of_the_library_are_ours(tmp_path, header, size):
    (tmp_path / "f").write_bytes(frame(header, bytes(size)))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load_file(tmp_path / "f")
    with pytest.raises(ProtocolError):
        load_file(tmp_path / "f")


# --- Malformed headers ----------------------------------------------------------------------

MALFORMED = {
    "empty": (b"", "begin with '{'"),
    "not_json": (b"{nonsense}", "not JSON"),
    "not_utf8": (b'{"\xff":1}', "not JSON"),
    "not_object": (b"[1,2]", "begin with '{'"),
    "space_first": (b" {}", "begin with '{'"),
    "bytes_after": (b"{}x", "not JSON"),
    "twice": (b'{"a":1,"a":1}', "stands twice"),
    "twice_inside": (b'{"__metadata__":{"a":"","a":""}}', "stands twice"),
    "nan": (b'{"a":NaN}', "NaN is not"),
    "infinity": (b'{"a":-Infinity}', "-Infinity is not"),
    "deep": (b'{"a":' + b"[" * 100_000, "not JSON"),
    "huge_int": (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
    "metadata_list": ({"__metadata__": []}, "__metadata__ is not"),
    "metadata_number": ({"__metadata__": {"a": 1}}, "__metadata__ is not"),
    "diloco_not_json": ({"__metadata__": {"diloco": "{"}}, "diloco field is not JSON"),
    "diloco_list": ({"__metadata__": {"diloco": "[]"}}, "diloco field is not a JSON object"),
    "diloco_nan": ({"__metadata__": {"diloco": '{"a":NaN}'}}, "diloco field is not JSON"),
    "diloco_twice": ({"__metadata__": {"diloco": '{"a":1,"a":1}'}}, "stands twice"),
    "entry_list": ({"a": []}, "'a': needs dtype"),
    "entry_short": ({"a": {"dtype": "F32", "shape": []}}, "'a': needs dtype"),
    "entry_more": ({"a": {**entry(), "more": 1}}, "'a': needs dtype"),
    "dtype_unknown": ({"a": entry("F128")}, "'F128' is not one of"),
    "dtype_number": ({"a": entry(4)}, "4 is not one of"),
    "dtype_list": ({"a": entry(["F32"])}, "is not one of"),
    "shape_number": ({"a": {**entry(), "shape": 1}}, "the shape"),
    "shape_bool": ({"a": entry(shape=[True])}, "the shape"),
    "shape_float": ({"a": entry(shape=[1.0])}, "the shape"),
    "shape_text": ({"a": entry(shape=["1"])}, "the shape"),
    "shape_negative": ({"a": entry(shape=[-1, -1])}, "the shape"),
    "shape_huge": ({"a": entry(shape=[0, 1 << 53], offsets=[0, 0])}, "the shape"),
    "shape_long": ({"a": entry(shape=[1] * 33)}, "the shape"),
    "offsets_object": ({"a": {**entry(), "data_offsets": {}}}, "data_offsets is not"),
    "offsets_three": ({"a": entry(offsets=[0, 4, 4])}, "data_offsets is not"),
    "offsets_bool": ({"a": entry("U8", offsets=[False, True])}, "data_offsets is not"),
    "offsets_negative": ({"a": entry(offsets=[-4, 0])}, "data_offsets is not"),
    "offsets_huge": ({"a": entry("U8", [4], [1 << 53, (1 << 53) + 4])}, "data_offsets is not"),
    "bytes_too_few": ({"a": entry(shape=[2])}, "takes 8 bytes, but .* spans 4"),
    "bytes_too_many": ({"a": entry(offsets=[0, 8])}, "takes 4 bytes, but .* spans 8"),
    "bytes_backward": ({"a": entry(offsets=[8, 4])}, "takes 4 bytes"),
    "product_huge": ({"a": entry(shape=[(1 << 53) - 1] * 32)}, "takes .* bytes"),
    "gap_first": ({"a": entry(offsets=[4, 8])}, "'a': its bytes begin at 4.* at 0"),
    "gap": ({"a": entry(), "b": entry(offsets=[8, 12])}, "'b': its bytes begin at 8.* at 4"),
    "overlap": ({"a": entry(), "b": entry(offsets=[2, 6])}, "'b': its bytes begin at 2"),
    "same_bytes": ({"a": entry(), "b": entry()}, "'b': its bytes begin at 0"),
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("in_order", [True, False])
def test_a_malformed_header_is_refused_by_its_rule(name, in_order):
    header, rule = MALFORMED[name]
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with allocates_under(2 << 20), pytest.raises(ProtocolError, match=rule):
        protocol.parse_header(raw, in_order)


def test_limits_are_checked_and_allowed():
    for length in (0, 1, MAX_HEADER_BYTES + 1, 1 << 63, (1 << 64) - 1):
        with pytest.raises(ProtocolError, match="allowed: 2 to"):
            protocol.header_length(struct.pack("<Q", length))
    assert protocol.header_length(struct.pack("<Q", MAX_HEADER_BYTES)) == MAX_HEADER_BYTES
    assert protocol.parse_header(b"{}") == ({}, [])
    specs = [TensorSpec("a", torch.float32, (1,) * 32), TensorSpec("b", torch.uint8, (1 << 50,))]
    with allocates_under(1 << 20):
        assert protocol.parse_header(encode_header({}, specs)[8:]) == ({}, specs)
    with pytest.raises(ProtocolError, match="is over"):  # nor is such a header sent
        encode_header({"text": "x" * MAX_HEADER_BYTES}, [])
    with pytest.raises(ValueError, match="JSON"):
        encode_header({"loss": math.nan}, [])


WHOLE = frame({"a": entry()}, b"1234")
BAD_FILES = {
    "empty": (b"", "too short"),
    "seven_bytes": (WHOLE[:7], "too short"),
    "length_huge": (struct.pack("<Q", 1 << 63) + b"{}", "allowed: 2 to"),
    "cut_in_header": (WHOLE[:30], "ends within its header"),
    "header_of_16_MiB": (struct.pack("<Q", MAX_HEADER_BYTES) + b"{}", "ends within its header"),
    "cut_in_payload": (WHOLE[:-1], "not whole"),
    "longer": (WHOLE + b"5", "not whole"),
    "payload_of_a_PiB": (frame({"a": entry("U8", [1 << 50], [0, 1 << 50])}, b"1"), "not whole"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_not_whole_is_refused(tmp_path, name):
    raw, rule = BAD_FILES[name]
    (tmp_path / "f").write_bytes(raw)
    with allocates_under(1 << 20), pytest.raises(ProtocolError, match=rule):
        load_file(tmp_path / "f")


BAD_FIELDS = [
    (int, None), (int, True), (int, 1.0), (int, "1"), (int, -1), (int, (1 << 53) + 1),
    (int, 10**400), (float, True), (float, "1"), (float, -0.5), (float, math.inf),
    (float, 10**400), (str, 1), (str, "x" * 257), (str, "a\nb"), (str, "\x1b[2J"),
    (str, "\ud800"), (bool, 1), (bool, "true"), (list, {}), (list, "ab"), (dict, []),
]  # fmt: skip


def test_fields():
    message = Message("push", {"i": 3, "f": 0.5, "s": "é" * 256, "b": False, "n": None}, [])
    assert message.field("i", int, low=3, high=3) == 3
    assert type(message.field("i", float)) is float
    assert [message.field(*f) for f in (("f", float), ("b", bool))] == [0.5, False]
    assert message.field("s", str) == "é" * 256
    assert message.field("n", int, 7) == message.field("absent", int, 7) == 7
    for kind, value in BAD_FIELDS:
        with pytest.raises(ProtocolError, match=f"push: field 'f' .* valid {kind.__name__}"):
            Message("push", {"f": value}, []).field("f", kind)
    for low, high in [(4, 9), (0, 2)]:
        with pytest.raises(ProtocolError, match="'i'"):
            message.field("i", int, low=low, high=high)


def test_expect_names_both_sides():
    a, b = TensorSpec("a", torch.float32, (2,)), TensorSpec("b", torch.bfloat16, (3, 4))
    Message("push", {}, [a, b]).expect(iter([a, b]))
    for sent, wanted, words in [
        ([a], [b], "carries a F32[2]; expected b BF16[3, 4]"),
        ([], [a], "carries nothing; expected a F32[2]"),
        ([a], [], "carries a F32[2]; expected nothing"),
        ([b, a], [a, b], "carries b BF16[3, 4], a F32[2]; expected a"),
        ([a], [a._replace(dtype=torch.int32)], "carries a F32[2]; expected a I32[2]"),
    ]:
        with pytest.raises(ProtocolError, match=re.escape(f"push: {words}")):
            Message("push", {}, sent).expect(wanted)


# --- Memory and files -----------------------------------------------------------------------


def test_memory_is_shared_and_keeps_its_tensor():
    tensor = torch.zeros(2, 3)
    view = memory(tensor)
    view[4:8] = struct.pack("<f", 1.5)
    assert tensor.tolist() == [[0, 1.5, 0], [0, 0, 0]]
    assert (view.nbytes, view.format, view.readonly) == (24, "B", False)
    alive = weakref.ref(tensor)
    part = view[8:]
    del tensor, view
    gc.collect()
    assert alive() is not None
    del part
    gc.collect()
    assert alive() is None


def test_memory_of_a_slice_nothing_and_the_unfit():
    tensor = torch.arange(6.0)
    assert bytes(memory(tensor[2:4])) == struct.pack("<2f", 2, 3)
    assert memory(torch.empty(0, 3)).nbytes == 0
    for unfit in (torch.zeros(2, 3).t(), torch.zeros(4)[::2], torch.zeros(2, device="meta")):
        with pytest.raises(ValueError, match="contiguous"):
            memory(unfit)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        protocol.write_beside(path, fail)
    with pytest.raises(ValueError, match="differ from their specs by -4"):
        specs = [TensorSpec("a", torch.float32, (1,))]
        protocol.write_beside(path, lambda f: protocol.write_frame(f, {}, specs, [torch.ones(2)]))
    assert os.listdir(tmp_path) == ["f"]
    assert path.read_bytes() == b"old"
    protocol.write_beside(path, lambda file: file.write(b"new"))
    assert os.listdir(tmp_path) == ["f"]
    assert path.read_bytes() == b"new"


WEIGHTS = {"w": random_bits(torch.float32, (3, 4)), "b": random_bits(torch.bfloat16, (5,))}


@pytest.mark.parametrize("kind", ["one", "sharded", "any name", "bin", "old bin", "file"])
def test_weights_are_read_in_every_layout(tmp_path, kind):
    path = tmp_path
    if "bin" in kind:  # what torch.save wrote before version 1.6 is another format
        is_new = kind == "bin"
        torch.save(WEIGHTS, path / "pytorch_model.bin", _use_new_zipfile_serialization=is_new)
    elif kind == "sharded":
        for name, tensor in WEIGHTS.items():
            safetensors.torch.save_file({name: tensor}, path / f"model-{name}.safetensors")
        index = {"weight_map": {name: f"model-{name}.safetensors" for name in WEIGHTS}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        name = "model" if kind == "one" else "some"
        safetensors.torch.save_file(WEIGHTS, path / f"{name}.safetensors")
        path = path / "some.safetensors" if kind == "file" else path
    assert_same(protocol.load_folder(str(path)), WEIGHTS)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


@pytest.mark.parametrize(
    "shards",
    [{"w": "../x"}, {"w": "/etc/x"}, {"w": ".."}, {"w": "missing.safetensors"}, {"w": 1}, 5, None],
)
def test_bad_weights_are_refused_in_one_line(tmp_path, monkeypatch, shards):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hf"
    folder.mkdir()
    if shards is None:
        torch.save({"w": Evil()}, folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(WEIGHTS, tmp_path / "x")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ProtocolError, match="hf") as error:
        protocol.load_folder(str(folder))
    assert "\n" not in str(error.value) and not (tmp_path / "evil").exists()


# (name of a file, what is in it, what is said of it) of files that are no plain weights.
OTHER_FILES = [
    ("nanogpt.pt", {"model": WEIGHTS, "best": torch.ones(())}, r"under 'model'.*path\)\['model'\]"),
    ("rng.pth", {"rng": torch.ones(9), "state_dict": WEIGHTS}, r"under 'state_dict'.*path\)\['sta"),
    ("timm.ckpt", {"state_dict_ema": WEIGHTS, "arch": "x"}, "under 'state_dict_ema'"),
    ("module.pt", torch.nn.Linear(2, 2), r"whole module.*weights alone, torch.save\(model.state_"),
    ("script.pt", torch.nn.Linear(2, 2), r"TorchScript.*torch.save\(model.state_dict\(\)"),
    ("list.bin", [*WEIGHTS.values()], r"no tensors.*torch.save\(model.state_dict\(\)"),
    ("empty.pt", None, r"\(EOFError\).*torch.save\(model"),
    ("empty.safetensors", {}, "there are none in it"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, content, said", OTHER_FILES, ids=[each[0] for each in OTHER_FILES])
def test_what_is_no_plain_weights_is_refused_with_what_to_do(tmp_path, name, content, said):
    path = str(tmp_path / name)
    if content is None:
        open(path, "w").close()
    elif name == "empty.safetensors":
        safetensors.torch.save_file(content, path)
    elif name == "script.pt":
        torch.jit.trace(content, torch.ones(2)).save(path)
    else:
        torch.save(content, path)
    with pytest.raises(ProtocolError, match=said) as error:
        protocol.load_folder(path)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


def test_two_files_of_the_same_weights_are_not_mixed(tmp_path):
    for name in "ab":
        safetensors.torch.save_file(WEIGHTS, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        ProtocolError, match=r"two files in .* have 'b': name one, such as .*b\.safe"
    ):
        protocol.load_folder(str(tmp_path))


def test_tensors_of_kinds_that_are_not_trained_are_carried_along(tmp_path):
    odd = {"c": torch.complex(*torch.ones(2, 3)), "e": torch.ones(3).to(torch.float8_e8m0fnu)}
    safetensors.torch.save_file({**WEIGHTS, **odd}, tmp_path / "model.safetensors")
    assert_same(protocol.load_folder(str(tmp_path)), {**WEIGHTS, **odd})
    torch.save({**WEIGHTS, "x._extra_state": {"scale": torch.ones(2)}}, tmp_path / "some.pt")
    assert_same(protocol.load_folder(str(tmp_path / "some.pt")), WEIGHTS)


# --- Connections ----------------------------------------------------------------------------


@pytest.fixture
def pair():
    """pair(stall=..., buffers=...): two Connections that are each other's peers."""
    with contextlib.ExitStack() as stack:

        def make(stall=10.0, buffers=None):
            with socket.create_server(("127.0.0.1", 0)) as listener:
                if buffers:  # before connecting: the receive window is agreed on then
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
                near = socket.create_connection(listener.getsockname())
                far, _ = listener.accept()
            for sock in (near, far):
                stack.callback(sock.close)
                if buffers:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
            return Connection(near, "127.0.0.1", stall), Connection(far, "127.0.0.1", stall)

        yield make


@pytest.fixture
def run():
    """run(function, *args): a future of a call in another thread; failures are not lost."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        futures = []

        def submit(function, *args):
            futures.append(pool.submit(function, *args))
            return futures[-1]

        yield submit
        for future in futures:
            future.result(30)


@pytest.mark.parametrize("buffers", [None, 4096])
def test_a_message_arrives_bit_for_bit(pair, run, buffers):
    near, far = pair(buffers=buffers)
    tensors = {
        "v": random_bits(torch.bfloat16, (300_001,)),
        "e": torch.empty(0),
        "s": random_bits(torch.float64, ()),
        "u": random_bits(torch.uint8, (3,)),
    }
    specs = protocol.specs_of(tensors.items())
    made = (tensor for tensor in tensors.values())  # may be made on the way
    sent = run(near.send, "push", {"loss": 0.1, "text": "é\n"}, specs, made)
    message = far.receive(idle=10)
    assert (message.type, message.fields) == ("push", {"loss": 0.1, "text": "é\n"})
    message.expect(specs)
    assert far.unread == protocol.payload_bytes(specs)
    received = {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}
    for tensor in received.values():
        far.read(tensor)
    sent.result(30)
    assert_same(received, tensors)
    assert far.unread == 0
    assert far.bytes_in == near.bytes_out > protocol.payload_bytes(specs)


def test_a_buffer_is_filled_in_place_and_nothing_is_allocated(pair, run):
    near, far = pair()
    specs = [TensorSpec("values", torch.float32, (1 << 18,))]
    numbers, buffer = torch.zeros(1 << 18), Payload(specs)
    place = buffer.tensors["values"].data_ptr()

    def send():
        for k in range(50):
            near.send("push", {}, specs, [numbers.fill_(k)])
            assert near.receive(idle=10).type == "ok"

    with allocates_under(100_000):
        run(send)
        for k in range(50):
            far.receive(idle=10).expect(specs)
            far.read(buffer.raw)
            assert buffer.tensors["values"].sum() == k * (1 << 18)
            far.send("ok")
    assert buffer.tensors["values"].data_ptr() == buffer.raw.data_ptr() == place


def test_a_payload_is_read_once_and_whole(pair):
    near, far = pair()
    near.send("a", {}, [TensorSpec("x", torch.uint8, (200_000,))], [torch.zeros(200_000).byte()])
    near.send("b")
    far.receive(idle=10)
    with pytest.raises(RuntimeError, match="200001 bytes wanted, 200000 are left"):
        far.read(torch.empty(200_001, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="have not been read"):
        far.receive(idle=10)
    far.discard()
    assert far.receive(idle=10).type == "b"
    with pytest.raises(ValueError, match="by 4 bytes"):
        near.send("a", {}, [TensorSpec("x", torch.uint8, (8,))], [torch.zeros(1)])


@pytest.mark.parametrize("rest", [12, 20], ids=["payload", "header"])
def test_a_slow_sender_is_no_stall_a_silent_one_is(pair, run, rest):
    near, far = pair(stall=0.5)
    raw = encode_header({"type": "a"}, [TensorSpec("x", torch.uint8, (12,))]) + bytes(12)

    def trickle(last):
        near.sock.sendall(raw[:-rest])
        for byte in raw[-rest:last]:
            time.sleep(0.05)
            near.sock.sendall(bytes([byte]))

    run(trickle, None)
    began = time.monotonic()
    assert far.receive(idle=10).type == "a"
    far.discard()
    assert time.monotonic() - began > 0.5
    run(trickle, -2)
    with pytest.raises(ConnectionError, match="sent no byte"):
        far.receive(idle=10)
        far.discard()


def test_a_slow_receiver_is_no_stall_a_silent_one_is(pair, run):
    near, far = pair(stall=0.5, buffers=32768)
    numbers = torch.zeros(2 << 20, dtype=torch.uint8)

    def take():
        for _ in range(20):
            time.sleep(0.05)
            far.sock.recv(65536, socket.MSG_WAITALL)

    slow = run(take)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="took no byte"):
        near.send("a", {}, protocol.specs_of([("x", numbers)]), [numbers])
    assert slow.done()
    assert 1.0 + 0.4 < time.monotonic() - began < protocol.STALL_SECONDS


def test_idle_is_for_the_first_byte_only(pair, run):
    near, far = pair(stall=0.2)

    def later(action, *args):
        time.sleep(0.5)
        action(*args)

    run(later, near.send, "a")
    assert far.receive(idle=None).type == "a"
    with pytest.raises(ConnectionError, match="sent no byte"):
        far.receive(idle=0.1)
    near.sock.sendall(b"1")
    run(later, near.close)
    with pytest.raises(ConnectionError, match="sent no byte"):
        far.receive(idle=None)  # a message that has begun has to move


@pytest.mark.parametrize("cut", [0, 3, 8, 40, -1])
def test_a_peer_that_closes_on_the_way_is_an_error(pair, cut):
    near, far = pair()
    raw = encode_header({"type": "a"}, [TensorSpec("x", torch.float32, (1,))]) + bytes(4)
    near.sock.sendall(raw[:cut])
    near.close()
    with pytest.raises(ConnectionError, match="closed the connection"):
        far.receive(idle=10)
        far.read(torch.empty(1))


def test_nothing_is_believed_that_is_only_announced(pair):
    near, far = pair()
    near.sock.sendall(struct.pack("<Q", MAX_HEADER_BYTES) + b"{}")
    near.close()
    with allocates_under(1 << 20), pytest.raises(ConnectionError, match="closed"):
        far.receive(idle=10)
    near, far = pair()
    near.sock.sendall(encode_header({"type": "a"}, [TensorSpec("x", torch.uint8, (1 << 50,))]))
    with allocates_under(1 << 20):
        assert far.receive(idle=10).specs[0].nbytes == far.unread == 1 << 50
    for fields in ({}, {"type": 1}, {"type": "x" * 33}):
        near, far = pair()
        near.sock.sendall(encode_header(fields, []))
        with pytest.raises(ProtocolError, match="without a type"):
            far.receive(idle=10)


def test_request_passes_waits_on_and_raises_refusals(pair, run):
    near, far = pair()

    def serve():
        for reply in (("wait", {"for": ["w1"]}), ("wait", {"for": []}), ("ok", {"x": 1})):
            far.send(*reply)
        far.send("error", {"message": "your model differs", "code": "model"})

    run(serve)
    waits = []
    assert near.request("push", on_wait=waits.append).fields == {"x": 1}
    assert waits == [{"for": ["w1"]}, {"for": []}]
    with pytest.raises(Refused, match="your model differs") as refusal:
        near.request("join")
    assert refusal.value.code == "model"


@pytest.mark.parametrize("hang_up", [False, True])
def test_a_refusal_in_the_middle_of_a_payload_is_heard(pair, run, hang_up):
    near, far = pair()
    numbers = torch.zeros(32 << 20, dtype=torch.uint8)

    def serve():
        far.receive(idle=10)
        far.read(torch.empty(1000))
        if hang_up:  # unread bytes make this a reset, so that sending fails
            far.send("error", {"message": "too big", "code": "size"})
        else:
            far.refuse(Refused("size", "too big"))
        far.close()

    run(serve)
    with pytest.raises(Refused, match="too big") as refusal:
        near.request("push", {}, protocol.specs_of([("x", numbers)]), [numbers])
    assert refusal.value.code == "size"
    assert (near.bytes_out > numbers.nbytes) != hang_up  # a refusal comes without a reset
    near.close()


def test_hello_says_who_is_there_and_opens_the_limit(pair, run):
    hello = {"protocol": protocol.PROTOCOL_VERSION}
    for fields, worker in [({"worker": "w", "session": "s"}, ("w", "s")), ({}, ("", ""))]:
        near, far = pair()
        answer = run(near.request, "hello", {**hello, **fields})
        protocol.greet(far, {"session": "i"})
        assert answer.result(30).fields == {**hello, "session": "i"}
        assert far.worker == worker
        near.sock.sendall(struct.pack("<Q", protocol.MAX_HELLO_BYTES + 1) + b"{}")
        near.close()
        error = ConnectionError if fields else ProtocolError  # who only looks needs no more
        with pytest.raises(error):
            far.receive(idle=10)


def test_hello_refuses_strangers_versions_and_anything_else(pair):
    for peer, type, fields, error, words in [
        (
            "8.8.8.8",
            "hello",
            {"protocol": protocol.PROTOCOL_VERSION},
            Refused,
            "8.8.8.8 is neither a loopback",
        ),
        (
            "2a00::1",
            "hello",
            {"protocol": protocol.PROTOCOL_VERSION},
            Refused,
            "neither a loopback",
        ),
        ("10.1.2.3", "hello", {"protocol": 99}, Refused, "version 6 of the protocol, you 99"),
        ("fe80::1%eth0", "join", {}, ProtocolError, "first message is 'join'"),
        ("::1", "hello", {}, ProtocolError, "'protocol'"),
        (
            "::1",
            "hello",
            {"protocol": protocol.PROTOCOL_VERSION, "worker": "w"},
            ProtocolError,
            "'session'",
        ),
        ("::1", "hello", {"x": "y" * protocol.MAX_HELLO_BYTES}, ProtocolError, "said hello"),
    ]:
        near, far = pair()
        far.peer = peer
        near.send(type, fields)
        with pytest.raises(error, match=words):
            protocol.greet(far, {})


def test_connect_says_hello_and_hears_a_refusal(run):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = f"127.0.0.1:{listener.getsockname()[1]}"

        def serve(peer):
            conn = Connection(listener.accept()[0], peer)
            try:
                protocol.greet(conn, {"x": 1})
            except Refused as error:
                conn.refuse(error)
            conn.close()

        run(serve, "::ffff:127.0.0.1")
        conn, fields = protocol.connect(server, {"worker": "w", "session": "s"})
        conn.close()
        assert fields == {"protocol": protocol.PROTOCOL_VERSION, "x": 1}
        run(serve, "8.8.8.8")
        with pytest.raises(Refused, match="neither a loopback") as refusal:
            protocol.connect(server, {})
        assert refusal.value.code == "address"
    with pytest.raises(OSError):
        protocol.connect(server, {})


def test_closed_by_peer_moves_no_byte(pair):
    near, far = pair()
    assert not far.closed_by_peer()
    near.send("a")
    near.sock.shutdown(socket.SHUT_WR)
    assert select.select([far.sock], [], [], DEADLINE)[0]
    assert not far.closed_by_peer()  # a message is still to be read
    assert far.receive(idle=10).type == "a"
    until(far.closed_by_peer, "the end after the message")
    far.close()
    assert far.closed_by_peer()


def test_addresses():
    for text, host, port in [
        ("host", "host", 8512), ("host:1", "host", 1), ("10.0.0.1:65535", "10.0.0.1", 65535),
        ("[::1]:99", "::1", 99), ("[::1]", "::1", 8512), ("fe80::1%eth0", "fe80::1%eth0", 8512),
    ]:  # fmt: skip
        assert protocol.parse_address(text) == (host, port)
    for text in "", ":80", "[]:80", "h:0", "h:65536", "h:x", "h:-1", "[::1]:x", "h:1.0":
        with pytest.raises(ValueError, match="write host:port"):
            protocol.parse_address(text)


# --- Codecs and the checksum ----------------------------------------------------------------


def test_bf16_rounds_to_nearest_even():
    cases = {
        0x3F800000: 0x3F80,  # 1.0, exact
        0x3F808000: 0x3F80,  # a tie: down to even
        0x3F818000: 0x3F82,  # a tie: up to even
        0x3F808001: 0x3F81,  # just over the tie
        0x3F817FFF: 0x3F81,  # just under it
        0xBF818000: 0xBF82,  # the same for negative numbers
        0x3FFF8000: 0x4000,  # a carry into the exponent
        0x80000000: 0x8000,  # -0.0
        0x00000001: 0x0000,  # a denormal
        0x7F7FFFFF: 0x7F80,  # the largest float32 becomes infinite
    }
    numbers = torch.frombuffer(bytearray(struct.pack("<10I", *cases)), dtype=torch.float32)
    buffer = Payload(CODECS["bf16"].layout(10))
    CODECS["bf16"].encode(numbers, buffer.tensors, 0)
    assert struct.unpack("<10H", bytes(memory(buffer.raw))) == tuple(cases.values())
    decoded = torch.empty(10)
    CODECS["bf16"].decode(buffer.tensors, 0, decoded)
    wide = struct.pack("<10I", *(b << 16 for b in cases.values()))
    assert bytes(memory(decoded)) == wide


@pytest.mark.parametrize("name, width", [("fp32", 4), ("bf16", 2)])
def test_a_codec_in_chunks_equals_the_whole(name, width):
    codec, count = CODECS[name], 2 * CHUNK + 3
    assert (codec.feedback, protocol.payload_bytes(codec.layout(count))) == (False, width * count)
    numbers, buffer = torch.randn(count), Payload(codec.layout(count))
    decoded = torch.empty(count)
    for a, b in protocol.chunks(count):
        codec.encode(numbers[a:b], buffer.tensors, a)
    assert codec.size < CHUNK
    for a, b in protocol.chunks(count, codec.size):
        codec.decode(buffer.tensors, a, decoded[a:b])
    exact = {4: torch.float32, 2: torch.bfloat16}[width]
    assert bits(buffer.raw) == bits(numbers.to(exact))
    assert bits(decoded) == bits(numbers.to(exact).float())


def all_finite(codec, tensors, count):
    return all(codec.finite(tensors, start, stop) for start, stop in protocol.chunks(count))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("at", [0, CHUNK - 1, CHUNK, CHUNK + 4])
def test_one_number_that_is_not_finite_is_found(codec, at):
    numbers, values = torch.full((CHUNK + 5,), -8e29), Payload(codec.layout(CHUNK + 5)).tensors

    def is_finite():
        for a, b in protocol.chunks(CHUNK + 5):
            codec.encode(numbers[a:b], values, a)
        return all_finite(codec, values, CHUNK + 5)

    assert is_finite()
    for bad in (math.nan, math.inf, -math.inf, 1.2e30, -1.2e30):
        numbers[at] = bad
        assert not is_finite()
        assert not protocol.within(torch.tensor([0.0, bad, 1.0]))
    if isinstance(codec, protocol.Cast):
        assert all_finite(codec, values, at)  # counts the slice's elements only
    assert protocol.within(torch.tensor([-1e30, 1e30, 0.0]))


SIZES = {"int8": 1.032, "int4": 0.532, "int2": 0.282, "top16": 0.065, "top32": 0.033}


@pytest.mark.parametrize("name, per_number", SIZES.items(), ids=SIZES)
@pytest.mark.parametrize("count", [1, 63, 64, 65, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
def test_blocks_are_as_worked_out_with_numpy(name, per_number, count):
    codec, buffer = CODECS[name], Payload(CODECS[name].layout(count))
    scales = torch.logspace(-35, 20, 55)  # from less than can be sent to far more than is likely
    numbers = torch.randn(count) * scales[torch.arange(count) // 64 % 55]
    last = 2048 if name.startswith("top") else 64  # numbers that the end is filled up to at most
    assert codec.feedback and len(buffer.raw) <= per_number * (count + last)
    decoded, sent = torch.ones(count), torch.ones(count)
    for a, b in protocol.chunks(count):
        codec.encode(numbers[a:b], buffer.tensors, a)
    encoded = buffer.raw.clone()
    for a, b in protocol.chunks(count):
        codec.decode(buffer.tensors, a, decoded[a:b])
        sent[a:b] = codec.sent(numbers[a:b], buffer.tensors, a)
    assert bits(decoded) == bits(rounded(numbers, name))
    assert bits(sent) == bits(decoded) and torch.equal(buffer.raw, encoded)
    assert all_finite(codec, buffer.tensors, count)


def test_the_bytes_of_a_block_by_hand():
    """A scale of 1 is 0x3F80 as bfloat16; -7 to 7 are stored as 1 to 15."""
    buffer = Payload(CODECS["int8"].layout(64))
    CODECS["int8"].encode(torch.arange(-127.0, 1.0, 2.0), buffer.tensors, 0)
    assert bytes(memory(buffer.raw)) == b"\x80\x3f" + bytes(b & 0xFF for b in range(-127, 1, 2))
    buffer = Payload(CODECS["int4"].layout(64))
    low, high = [-7.0, 7, 0, 1] * 8, [3.0, -1, 0, -7] * 8
    CODECS["int4"].encode(torch.tensor([*low, *high]), buffer.tensors, 0)
    assert bytes(memory(buffer.raw)) == b"\x80\x3f" + bytes([0xB1, 0x7F, 0x88, 0x19] * 8)
    # Of two bits, 0 to 3 stand for -1.5, -0.5, 0.5 and 1.5 scales; here the largest is 2.5.
    buffer = Payload(CODECS["int2"].layout(64))
    quarters = [[-2.5, 0], [2.5, 0.9], [1.0, -0.1], [-1.0, -1.2]]
    CODECS["int2"].encode(torch.tensor([part * 8 for part in quarters]).view(-1), buffer.tensors, 0)
    levels = [0b01_11_11_00, 0b00_01_10_10]
    assert bytes(memory(buffer.raw)) == b"\x80\x3f" + bytes(levels * 8)


def test_the_bytes_of_the_largest_by_hand():
    """Of each 32 numbers, 64 apart: the place, 32 for negative, and 64 times its size in scales."""
    buffer, numbers = Payload(CODECS["top32"].layout(2048)), torch.full((32, 64), 0.4)
    numbers[7, 0], numbers[31, 1], numbers[0, 2] = 3.0, -2.1, 0.9
    CODECS["top32"].encode(numbers.view(-1), buffer.tensors, 0)
    raw = bytes(memory(buffer.raw))
    assert raw[:5] == b"\x80\x3f" + bytes([7 + 64 * 3, 31 + 32 + 64 * 2, 64])
    assert set(raw[5:]) == {31}  # of equal ones the last; under half a scale it is sent as zero
    decoded = torch.empty(2048)
    CODECS["top32"].decode(buffer.tensors, 0, decoded)
    assert decoded.view(32, 64)[[7, 31, 0], [0, 1, 2]].tolist() == [3, -2, 1]
    assert decoded.count_nonzero() == 3


def checksum_by_hand(numbers):
    raw, sums = bytes(memory(numbers)), []
    for start in range(0, len(raw), 4 * CHUNK):
        part = raw[start : start + 4 * CHUNK]
        part += bytes(-len(part) % 8)
        sums.append(sum(struct.unpack(f"<{len(part) // 8}Q", part)) % (1 << 64))
    return list(hashlib.blake2b(struct.pack(f"<{len(sums)}Q", *sums), digest_size=16).digest())


@pytest.mark.parametrize("count", [0, 1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
def test_checksum_is_as_worked_out_by_hand(count):
    numbers = random_bits(torch.float32, (count,), count)
    digest = protocol.checksum_of(numbers)
    assert protocol.specs_of([("checksum", digest)]) == [protocol.Checksum.SPEC]
    assert (
        digest.tolist()
        == checksum_by_hand(numbers)
        == protocol.checksum_of(numbers.clone()).tolist()
    )
    in_tiles = protocol.Checksum()
    for start, stop in protocol.chunks(count, protocol.TILE):
        in_tiles.add(numbers[start:stop])
    assert in_tiles.digest().tolist() == digest.tolist()


@once
@given(st.integers(0, 299), st.integers(0, 31))
def test_checksum_changes_with_any_bit(at, bit):  # so -0.0 is not 0.0, and a NaN not another
    numbers = random_bits(torch.float32, (300,))
    before = protocol.checksum_of(numbers).tolist()
    memory(numbers)[4 * at + bit // 8] ^= 1 << bit % 8
    assert protocol.checksum_of(numbers).tolist() != before


# --- The flat vector ------------------------------------------------------------------------


def odd_parameters():
    """Two of each trouble: dtypes, scalars, nothing, and memory in another order than rows."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)
    tensors = [torch.empty(0, 5), torch.randn(3, 4), torch.tensor(1.5), torch.randn(7).bfloat16()]
    tensors += [torch.empty(0), image, torch.randn(4, 3).t(), torch.randn(3).half(), torch.empty(0)]
    return [torch.nn.Parameter(tensor) for tensor in tensors]


TOTAL = 12 + 1 + 7 + 24 + 12 + 3
SLICES = [(a, b) for a in range(0, TOTAL + 1, 3) for b in range(a, TOTAL + 1, 2)] + [(0, TOTAL)]


def test_flat_model_reads_writes_and_rounds_any_slice():
    parameters = odd_parameters()
    flat = protocol.FlatModel(parameters)
    assert flat.numel == TOTAL
    expected = torch.cat([p.detach().reshape(-1).float() for p in parameters])
    places = [(p.data_ptr(), p.stride()) for p in parameters]
    for start, stop in SLICES:
        out = torch.full((stop - start,), math.nan)
        flat.read(start, out)
        assert bits(out) == bits(expected[start:stop])

        values = torch.randn(stop - start)
        wished = torch.cat([expected[:start], values, expected[stop:]])
        parts = wished.split([p.numel() for p in parameters])
        rounded = [part.to(p.dtype) for p, part in zip(parameters, parts, strict=True)]
        expected = torch.cat([part.float() for part in rounded])
        kept = values.clone()
        assert bits(flat.rounded(start, values)) == bits(expected[start:stop])
        assert torch.equal(values, kept)
        flat.write(start, values)
        for parameter, part in zip(parameters, rounded, strict=True):
            assert bits(parameter.detach().reshape(-1)) == bits(part)
    assert [(p.data_ptr(), p.stride()) for p in parameters] == places
    assert all(p.requires_grad and p.grad_fn is None for p in parameters)


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("stripe", [1, 2, 4, 16])
def test_a_slice_of_a_model_is_that_of_its_flat_vector(monkeypatch, count, stripe):
    monkeypatch.setattr(protocol, "stripe_of", lambda total, count: stripe)
    parameters = odd_parameters()
    mine = [places(TOTAL, k, count) for k in range(count)]

    def flat():
        return torch.cat([p.detach().float().reshape(-1) for p in parameters])

    for k in range(count):
        part, expected = protocol.FlatModel(parameters, k, count), flat()[mine[k]]
        assert part.numel == len(expected)
        for start, stop in itertools.combinations(range(part.numel + 1), 2):
            out, difference, ones = torch.empty(3, stop - start)
            part.read(start, out)
            assert torch.equal(out, expected[start:stop])
            part.subtract_from(start, ones.fill_(1), difference)
            assert torch.equal(difference, 1 - expected[start:stop])
    wished = flat()
    for k, start in itertools.product(range(count), (0, 1, 3)):
        part = protocol.FlatModel(parameters, k, count)
        values = torch.randn(max(0, part.numel - start - 1))
        wished[mine[k][start : start + len(values)]] = part.rounded(start, values)
        part.write(start, values)
        assert torch.equal(flat(), wished)


def test_what_parameters_are_beyond_a_mark_goes_on_top_of_an_anchor(monkeypatch):
    """To the bit, whatever their dtype and the order of their memory; and what is not finite is told."""
    monkeypatch.setattr(protocol, "stripe_of", lambda total, count: 2)
    parameters = odd_parameters()
    for k, start in itertools.product(range(3), (0, 1, 3)):
        part = protocol.FlatModel(parameters, k, 3)
        mark, anchor, local, now = torch.randn(4, part.numel - start - 1)
        part.read(start, local)
        kept = mark.clone(), anchor.clone()
        assert part.move(start, mark, anchor)
        part.read(start, now)
        assert bits(now) == bits(part.rounded(start, local - mark + anchor))
        assert bits(mark) == bits(kept[0]) and bits(anchor) == bits(kept[1])
    for bad in (math.nan, math.inf):
        mark[1] = bad
        assert not part.move(start, mark, anchor)


def test_stripes_of_a_vector_by_hand():
    # Of a large vector a stripe has 256 elements; of a small one each slice has 64 stripes or more,
    # and of a tiny one a stripe is an element.
    found = {total: protocol.stripe_of(total, 4) for total in (0, 8, 511, 512, 32767, 65536, 10**9)}
    assert found == {0: 1, 8: 1, 511: 1, 512: 2, 32767: 64, 65536: 256, 10**9: 256}
    assert CHUNK % 256 == 0  # chunks of all slices are a run of the vector
    assert protocol.stripe_of(1000, 1) == 1000 and protocol.stripe_of(0, 1) == 1
    first, second = torch.zeros(300), torch.zeros(700)
    flats = [protocol.FlatModel([first, second], k, 2, 256) for k in (0, 1)]
    assert [flat.numel for flat in flats] == [512, 488]
    flats[1].write(0, torch.arange(1.0, 489))
    assert first.tolist() == [0] * 256 + [*range(1, 45)]
    assert second.tolist() == [*range(45, 257)] + [0] * 256 + [*range(257, 489)]
    part, out = protocol.FlatModel([second], 1, 2, 256, at=300), torch.zeros(444)
    assert part.parts[0][1:] == (44, 488, 300)
    part.read(44, out)
    assert out.tolist() == [*range(45, 489)]


def test_manifest_ranges_and_fragments_cover_the_vector():
    specs = protocol.specs_of((f"p{k}", p) for k, p in enumerate(odd_parameters()))
    listed = json.loads(json.dumps(protocol.manifest_to_json(specs)))
    assert protocol.manifest_from_json(listed) == specs
    borders = [(start, stop) for _, start, stop in protocol.ranges(specs)]
    assert borders[:4] == [(0, 0), (0, 12), (12, 13), (13, 20)]
    assert borders[-1] == (TOTAL, TOTAL)
    for total in (1, 5, TOTAL):
        for count in (1, 2, 3, 8):
            parts = [protocol.FlatModel([torch.ones(total)], k, count) for k in range(count)]
            assert sum(part.numel for part in parts) == total
            assert max(p.numel for p in parts) - min(p.numel for p in parts) <= parts[0].stripe
    spans = list(protocol.chunks(2 * CHUNK + 1))
    assert spans == [(0, CHUNK), (CHUNK, 2 * CHUNK), (2 * CHUNK, 2 * CHUNK + 1)]
    assert list(protocol.chunks(0)) == []


BAD_MANIFESTS = [
    None, 3, "abc", [], {}, [None], [["a", "F32"]], [["a", "F32", [1], 1]],
    [["a", "F128", [1]]], [["a", ["F32"], [1]]], [["a", "I64", [1]]],
    [["a", "F32", 1]], [["a", "F32", "1"]], [["a", "F32", [1.0]]], [["a", "F32", [True]]],
    [["a", "F32", [-1]]], [["a", "F32", [[1]]]], [["a", "F32", [1] * 33]],
    [["a", "F32", [1 << 53, 0]]], [["a", "F32", [1 << 52]]], [["a", "F32", [1e308, 1e308]]],
    [["a", "F32", [1]], ["a", "F32", [1]]], [["a", "F32", [0]], ["a", "F32", [0]]],
    [["__metadata__", "F32", [1]]], [[["a"], "F32", [1]]],
    [[None, "F32", [1]]], [[1, "F32", [1]]], [[True, "F32", [1]]],
    [["a", "F32", [9999] * 100_000]],  # its product takes seconds
]  # fmt: skip


@pytest.mark.parametrize("listed", BAD_MANIFESTS, ids=lambda listed: str(listed)[:40])
def test_a_malformed_manifest_is_refused(listed):
    began = time.thread_time()
    with pytest.raises(ProtocolError):
        protocol.manifest_from_json(listed)
    assert time.thread_time() - began < 0.5


def test_a_mismatch_is_explained_by_name_and_shapes():
    def manifest(**shapes):
        return [TensorSpec(name, torch.float32, shape) for name, shape in shapes.items()]

    server = manifest(a=(2, 3), b=(4,))
    assert protocol.explain_mismatch(server, server[::-1]) == ""  # found by name, in any order
    narrow = [spec._replace(dtype=torch.bfloat16) for spec in server]
    assert protocol.explain_mismatch(server, narrow) == ""
    words = protocol.explain_mismatch(server, manifest(a=(3, 2), c=(5,)))
    assert "'a' is [2, 3] on the server and [3, 2] here" in words
    assert "'b' [4] of the server is missing here" in words
    assert "'c' [5] is not in the server's model" in words
    many = protocol.explain_mismatch(manifest(**{f"t{k}": (k,) for k in range(9)}), [])
    assert many.endswith("; and 6 more")
