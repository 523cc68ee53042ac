"""What must hold of every lock and of every packing of files into layers."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from builder.lockfile import LockFile, Request
from builder.models import LockedFile, ModelLock
from builder.plan import MAX_WEIGHT_LAYERS, pack_layers

quick = settings(max_examples=100, derandomize=True, deadline=None)

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)


def _files(max_size: int) -> st.SearchStrategy[list[LockedFile]]:
    names = st.builds(
        lambda stem, suffix: f"{stem}{suffix}",
        st.text("abc/", min_size=1, max_size=6),
        st.sampled_from([".safetensors", ".json", ".txt"]),
    )
    one = st.builds(LockedFile, path=names, size=st.integers(0, 1 << 20), sha256=digests)
    return st.lists(one, max_size=max_size, unique_by=lambda file: file.path)


locks = st.builds(
    ModelLock,
    name=words,
    source=words,
    revision=st.none() | words,
    license=st.none() | words,
    architectures=st.lists(words, max_size=2).map(tuple),
    dtype=st.none() | words,
    parameters=st.none() | st.integers(0, 1 << 40),
    quantization=st.none() | words,
    remote_code=st.booleans(),
    files=_files(4).map(tuple),
)


@quick
@given(
    model=locks,
    request=st.builds(Request, model=words, revision=st.none() | words),
    tools=st.dictionaries(words, words, max_size=2),
)
def test_lock_file_comes_back_as_it_was_written(
    model: ModelLock, request: Request, tools: dict[str, str]
) -> None:
    written = LockFile(tools=tools, request=request, model=model)
    again = LockFile.model_validate_json(written.to_bytes())
    assert again == written
    assert again.to_bytes() == written.to_bytes()
    assert again.model.digest == model.digest


@quick
@given(model=locks, data=st.data())
def test_lock_is_the_same_whatever_order_its_fields_were_given_in(
    model: ModelLock, data: st.DataObject
) -> None:
    fields = data.draw(st.permutations(sorted(model.model_dump().items())))
    shuffled = ModelLock.model_validate(dict(fields))
    assert shuffled.canonical() == model.canonical()
    assert shuffled.digest == model.digest


@quick
@given(one=locks, data=st.data())
def test_digest_changes_with_the_content_and_only_then(one: ModelLock, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(ModelLock.model_fields)))
    other = one.model_copy(update={name: getattr(data.draw(locks), name)})
    assert (one.digest == other.digest) == (one == other)


def _bound(files: Sequence[LockedFile], bound: int) -> int:
    """The bound that was asked for, or its smallest doubling that needs no more layers than there may be."""
    while len(_greedy([f for f in files if f.is_shard], bound)) + any(not f.is_shard for f in files) > (
        MAX_WEIGHT_LAYERS
    ):
        bound *= 2
    return bound


def _greedy(shards: Sequence[LockedFile], bound: int) -> list[int]:
    """Bytes of each layer when shards fill one layer after the other."""
    sizes: list[int] = []
    for shard in sorted(shards, key=lambda file: file.path):
        if sizes and sizes[-1] + shard.size <= bound:
            sizes[-1] += shard.size
        else:
            sizes.append(shard.size)
    return sizes


@quick
@given(files=_files(150), bound=st.integers(1, 1 << 21), data=st.data())
def test_layers_carry_every_file_once_within_the_bound(
    files: list[LockedFile], bound: int, data: st.DataObject
) -> None:
    layers = pack_layers(files, bound)
    assert sorted(f.path for layer in layers for f in layer) == sorted(f.path for f in files)
    assert all(layer for layer in layers)
    assert len(layers) <= MAX_WEIGHT_LAYERS
    allowed = _bound(files, bound)
    for layer in layers:
        shards = [file for file in layer if file.is_shard]
        assert not shards or len(shards) == len(layer)  # small files have a layer of their own
        assert len(shards) <= 1 or sum(file.size for file in shards) <= allowed
    assert pack_layers(data.draw(st.permutations(files)), bound) == layers


def test_many_large_shards_stay_within_the_layer_budget() -> None:
    shards = [LockedFile(path=f"{n:04}.safetensors", size=10, sha256="0" * 64) for n in range(1000)]
    small = LockedFile(path="config.json", size=1, sha256="0" * 64)
    layers = pack_layers([*shards, small], 1)
    assert len(layers) <= MAX_WEIGHT_LAYERS
    assert layers[0] == (small,)
