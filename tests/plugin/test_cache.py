"""The merged-adapter cache: bounded, least recently used first, never what is in use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_lego.cache import CachedMerge, CacheFullError, MergedAdapterCache


def merge(nbytes: int) -> CachedMerge:
    return CachedMerge("", nbytes, 1.0)


def filled(max_bytes: int = 30) -> MergedAdapterCache:
    cache = MergedAdapterCache(max_bytes)
    for name in ("a", "b", "c"):
        cache[name] = merge(10)
    return cache


def test_the_least_recently_used_goes_first():
    cache = filled()
    cache.get("a")
    cache["d"] = merge(10)
    assert sorted(cache) == ["a", "c", "d"]
    assert [name for name, _ in cache.evicted] == ["b"]


def test_looking_is_not_using():
    cache = filled()
    assert list(cache.snapshot()) == ["a", "b", "c"]
    cache["d"] = merge(10)
    assert sorted(cache) == ["b", "c", "d"]


def test_what_is_in_use_stays():
    cache = filled()
    with cache.pinned("a"), cache.pinned("b"):
        cache["d"] = merge(10)
        assert sorted(cache) == ["a", "b", "d"]
    assert [name for name, _ in cache.evicted] == ["c"]


def test_a_merge_that_does_not_fit_beside_what_is_in_use_evicts_nothing():
    cache = filled()
    with cache.pinned("a"), cache.pinned("b"), pytest.raises(CacheFullError):
        cache["d"] = merge(11)
    assert sorted(cache) == ["a", "b", "c"]
    assert cache.evicted == []


def test_a_merge_larger_than_the_cache_evicts_nothing():
    cache = filled()
    with pytest.raises(CacheFullError):
        cache["d"] = merge(31)
    assert sorted(cache) == ["a", "b", "c"]


def test_pins_count():
    cache = filled()
    with cache.pinned("a"):
        with cache.pinned("a"):
            pass
        assert cache._pins == {"a": 1}
    assert not cache._pins


def test_what_is_pinned_before_it_exists_is_kept():
    cache = filled()
    with cache.pinned("d"):
        cache["d"] = merge(10)
        for name in "efg":
            cache[name] = merge(10)
        assert "d" in cache


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 12), st.booleans()), max_size=40)
)
def test_it_never_exceeds_its_bytes_nor_drops_a_pin(steps):
    cache = MergedAdapterCache(20)
    pins = {}
    for name, nbytes, pin in steps:
        try:
            cache[name] = merge(nbytes)
        except CacheFullError:
            continue
        if pin and name not in pins:
            pins[name] = cache.pinned(name)
            pins[name].__enter__()
        elif not pin and name in pins:
            pins.pop(name).__exit__(None, None, None)
        assert cache.currsize <= 20
        assert cache.currsize == sum(m.nbytes for m in cache.snapshot().values())
        assert set(pins) <= set(cache)
