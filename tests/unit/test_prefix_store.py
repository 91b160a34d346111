from __future__ import annotations

from core.inference.prefix_store import BLOCK_TOKENS, PrefixStore, block_keys


def keys(ids: list[int], *, base: str = "b", adapter: str | None = "a", project: str = "p"):
    return block_keys(ids, base_digest=base, adapter_digest=adapter, project_id=project)


def fill(store: PrefixStore, prompt: list[bytes], name: str, size: int = 10) -> None:
    for index in range(len(prompt)):
        if store.wants(prompt[index]):
            store.put("b", prompt, index, f"{name}{index}", size)


def test_only_whole_blocks_before_the_last_token_have_keys() -> None:
    ids = list(range(3 * BLOCK_TOKENS))
    assert len(keys(ids)) == 2
    assert len(keys([*ids, 0])) == 3
    assert keys(ids[:BLOCK_TOKENS]) == []


def test_a_key_depends_on_all_that_went_into_the_block() -> None:
    ids = list(range(3 * BLOCK_TOKENS))
    found = keys(ids)
    for others in (
        keys(ids, base="c"),
        keys(ids, adapter=None),
        keys(ids, adapter="c"),
        keys(ids, project="q"),
        keys([7, *ids[1:]]),
    ):
        assert set(found).isdisjoint(others)
    assert keys([*ids[: BLOCK_TOKENS + 3], 7, *ids[BLOCK_TOKENS + 4 :]])[0] == found[0]


def test_blocks_are_found_up_to_the_first_that_differs() -> None:
    store = PrefixStore(1000)
    ids = list(range(5 * BLOCK_TOKENS))
    fill(store, keys(ids), "x")
    other = keys([*ids[: 2 * BLOCK_TOKENS], *ids[::-1]])
    assert store.find(other, 0) == ["x0", "x1"]
    assert store.find(other, 1) == ["x1"]
    assert store.find(other, 2) == []
    assert store.find(keys(ids, project="q"), 0) == []


def test_the_size_is_bounded_and_chains_break_from_behind() -> None:
    store = PrefixStore(60)
    first, second = list(range(6 * BLOCK_TOKENS)), list(range(1, 4 * BLOCK_TOKENS))
    fill(store, keys(first), "x")
    assert store.bytes == 50
    fill(store, keys(second), "y")
    assert store.bytes == 60
    assert store.find(keys(second), 0) == ["y0", "y1", "y2"]
    assert store.find(keys(first), 0) == ["x0", "x1", "x2"]


def test_nothing_is_wanted_without_room() -> None:
    store = PrefixStore(1)
    prompt = keys(list(range(100)))
    fill(store, prompt, "x")
    assert store.bytes == 0
    assert store.find(prompt, 0) == []


def test_a_base_model_leaves_with_its_blocks() -> None:
    store = PrefixStore(1000)
    prompt = keys(list(range(100)))
    fill(store, prompt, "x")
    store.drop_base("c")
    assert store.find(prompt, 0)
    store.drop_base("b")
    assert (store.bytes, store.find(prompt, 0)) == (0, [])
