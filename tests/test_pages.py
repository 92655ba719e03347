"""serve/pages.py: leases and what is found again, against a model that keeps the bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupyq.ops.cache_pages import cache_rotate
from cupyq.serve.pages import MustWait, PagePool, common_length, digest_of

SIZE = 4


def content(tokens, position, salt=b""):
    """What "the keys and values" of a token are: they depend on all tokens before it."""
    return hash((salt, *tokens[: position + 1])) & 0x7FFFFFFF


class Cache:
    """Pages with contents, kept as the generator keeps its arrays."""

    def __init__(self, pages, **options):
        self.pool = PagePool(pages, SIZE, **options)
        self.bytes = np.full((pages, SIZE), -1, np.int64)

    def begin(self, prompt, most, salt=b""):
        lease = self.pool.lease(prompt, most, salt)
        if lease is None:
            return None
        if lease.copied is not None:
            source, to = lease.copied
            assert source != to
            self.bytes[to] = self.bytes[source]
        for position in range(lease.cached):
            assert self.at(lease, position) == content(prompt, position, salt)
        return lease

    def at(self, lease, position):
        return self.bytes[lease.pages[position // SIZE], position % SIZE]

    def write(self, lease, tokens, position, salt=b""):
        self.bytes[lease.pages[position // SIZE], position % SIZE] = content(tokens, position, salt)


def check_books(pool, leases):
    users = [0] * len(pool)
    for lease in leases:
        assert len(set(lease.pages)) == len(lease.pages)
        for page in lease.pages:
            users[page] += 1
    assert [info.users for info in pool._pages] == users
    assert set(pool._unused) == {page for page, count in enumerate(users) if not count}
    for digest, page in pool._known.items():
        info = pool._pages[page]
        assert info.digest == digest == digest_of(info.parent, info.tokens) and info.filled == SIZE
    for parent, pages in pool._children.items():
        assert pages and all(pool._pages[page].parent == parent for page in pages)
    assert sum(map(len, pool._children.values())) == sum(info.parent is not None for info in pool._pages)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["begin", "begin", "begin", "feed", "feed", "end", "order", "forget"]), st.integers(0, 1 << 20)),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(ACTIONS, st.integers(3, 12), st.booleans())
def test_whatever_happens_a_job_finds_what_it_would_have_computed(actions, pages, copies):
    cache, jobs = Cache(pages, copies=copies), []
    for action, number in actions:
        rng = np.random.default_rng(number)
        if action == "begin":
            prompt, salt = rng.integers(0, 2, int(rng.integers(1, 14))).tolist(), [b"", b"adapter"][number % 2]
            most = len(prompt) + int(rng.integers(0, 6))
            before = cache.pool.free
            try:
                lease = cache.begin(prompt, most, salt)
            except MustWait:
                # Somebody is still computing what is waited for.
                assert any(fed < len(tokens) - 1 for _, tokens, fed, _, _ in jobs)
                assert cache.pool.free == before
                continue
            if lease is None:
                assert cache.pool.free == before < cache.pool.pages_for(most)
                continue
            assert len(lease.pages) == cache.pool.pages_for(most) and lease.cached <= len(prompt) - 1
            jobs.append([lease, prompt, lease.cached, most, salt])
        elif jobs and action == "feed":
            job = jobs[number % len(jobs)]
            lease, tokens, fed, most, salt = job
            for _ in range(int(rng.integers(1, 5))):
                if fed < most:
                    cache.write(lease, tokens, fed, salt)
                    fed += 1
                    if fed == len(tokens):
                        tokens.append(int(rng.integers(0, 2)))
            job[2] = fed
            cache.pool.fill(lease, tokens, fed)
        elif jobs and action == "end":
            lease, tokens, fed, _, _ = jobs.pop(number % len(jobs))
            cache.pool.fill(lease, tokens, fed)
            cache.pool.release(lease)
        elif action == "order" and not jobs:
            for cycle in cache.pool.defragment():
                cache_rotate(cache.bytes, np.array(cycle, np.int32))
        elif action == "order":
            with pytest.raises(ValueError, match="pages are in use"):
                cache.pool.defragment()
        elif action == "forget":
            cache.pool.forget()
        check_books(cache.pool, [job[0] for job in jobs])
        for lease, tokens, fed, _, salt in jobs:  # nobody wrote where another reads
            assert all(cache.at(lease, i) == content(tokens, i, salt) for i in range(fed))
    for job in jobs:
        cache.pool.release(job[0])
    assert cache.pool.free == pages


def filled(cache, prompt, most=None, salt=b""):
    lease = cache.begin(prompt, len(prompt) if most is None else most, salt)
    for position in range(lease.cached, len(prompt) - 1):
        cache.write(lease, prompt, position, salt)
    cache.pool.fill(lease, prompt, len(prompt) - 1)
    return lease


def test_full_pages_are_shared_and_the_last_token_is_always_fed():
    cache = Cache(8)
    a = filled(cache, list(range(9)))
    b = cache.begin(list(range(9)), 9)
    assert b.pages[:2] == a.pages[:2] and b.pages[2] != a.pages[2] and b.cached == 8
    c = cache.begin(list(range(8)), 8)  # its second page would hold the token that is to be fed
    assert c.pages[0] == a.pages[0] and c.pages[1] not in a.pages and c.cached == 7
    assert cache.pool.free == 8 - 3 - 1 - 1


def test_the_beginning_of_a_page_is_copied():
    cache = Cache(8)
    a = filled(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    b = cache.begin([1, 2, 3, 4, 5, 6, 0, 0, 0], 9)
    assert b.copied == (a.pages[1], b.pages[1]) and b.cached == 6
    c = cache.begin([1, 2, 3, 4, 5, 0, 0, 0, 0], 9)  # one token is not worth a copy
    assert c.copied is None and c.cached == 4
    without = Cache(8, copies=False)
    filled(without, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert without.begin([1, 2, 3, 4, 5, 6, 0, 0, 0], 9).cached == 4


def test_the_longest_match_wins():
    cache = Cache(12)
    for text in ([1, 2, 3, 9, 9], [1, 2, 3, 4, 9], [1, 2, 9, 9, 9]):
        cache.pool.release(filled(cache, text))
    assert cache.begin([1, 2, 3, 4, 9, 9], 6).cached == 4
    assert cache.begin([1, 2, 3, 0, 0], 5).cached == 3


def test_the_end_of_a_text_goes_first_and_the_oldest_text():
    cache = Cache(6)
    old, new = [[start + i for i in range(9)] for start in (100, 200)]
    for text in (old, new):
        cache.pool.release(filled(cache, text, 9))
    taken = cache.begin([7] * 9, 12)  # the two pages that hold nothing, and one more
    assert len(taken.pages) == 3
    cache.pool.release(taken)
    assert cache.begin(new, 9).cached == 8
    assert cache.begin(old, 9).cached == 4  # its second page went


def test_a_page_that_must_go_is_its_own_copy():
    cache = Cache(2)
    cache.pool.release(filled(cache, [1, 2, 3, 4, 5, 6, 7]))
    lease = cache.begin([1, 2, 3, 0, 0, 0, 0], 8)
    assert lease.copied is None and lease.cached == 3


def test_a_prompt_waits_for_one_that_computes_the_same():
    cache = Cache(8)
    prompt = list(range(9))
    lease = cache.begin(prompt, 9)
    for same in (prompt, prompt[:7]):
        with pytest.raises(MustWait):
            cache.begin(same, 9)
    other = cache.begin([5, *prompt], 10)
    assert other is not None
    cache.pool.release(lease)  # given up before it computed anything
    assert cache.begin(prompt, 9).cached == 0


def test_adapters_do_not_share():
    cache = Cache(8)
    filled(cache, list(range(9)), salt=b"a")
    assert cache.begin(list(range(9)), 9, b"b").cached == 0
    assert digest_of(b"", [0]) != digest_of(b"", [1])


def test_texts_are_in_one_piece_after_defragmenting():
    cache = Cache(10)
    singles = [filled(cache, [start] * 5, 4) for start in range(10)]
    for lease in singles[1::2] + singles[::2]:
        cache.pool.release(lease)
    text = list(range(100, 113))
    lease = filled(cache, text, 13)
    assert lease.pages == [1, 3, 5, 7]  # in the order in which they were given back
    cache.pool.release(lease)
    cycles = cache.pool.defragment()
    for cycle in cycles:
        cache_rotate(cache.bytes, np.array(cycle, np.int32))
    check_books(cache.pool, [])
    assert cycles and cache.pool.defragment() == []
    found = cache.begin(text, 13)
    assert found.cached == 12 and found.pages[:3] == list(range(found.pages[0], found.pages[0] + 3))


def test_common_length():
    assert [common_length(*pair) for pair in (([], [1]), ([1, 2], [1, 2, 3]), ([1, 5], [1, 2]), ([4], [5]))] == [0, 2, 1, 0]
