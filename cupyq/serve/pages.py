"""Which page holds whose tokens: reference counts, pages found again by what they hold, and which page goes first.

Host logic alone: no array of keys or values is touched here. A page is known by a digest of all tokens up to its end; a
job takes over pages whose digests are those of its prompt, and copies the beginning of a page that starts as its own next
one does. Pages that nobody uses keep what they hold until a new job needs room: least recently used first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cupyq.ops.cache_pages import cycles_of

LEAST_COPIED = 2
"""Tokens that are worth the copy of a page."""


class MustWait(Exception):
    """Another job is computing pages that this one would compute too: they will be there soon."""


@dataclass
class Lease:
    """The pages of one job, in the order of its tokens."""

    pages: list[int]
    cached: int
    """Tokens at the start whose keys and values are there."""
    copied: tuple[int, int] | None
    """(page, its copy): the bytes to be copied before anything else is written."""
    parents: list[bytes]
    """Digest of all tokens before page i, as far as they are known: parents[0] is the salt's."""


@dataclass
class _Page:
    users: int = 0
    parent: bytes | None = None
    """Digest of the tokens before it; None: nothing is known of it, nobody finds it."""
    tokens: tuple[int, ...] = ()
    """What it holds, or will as soon as its job's prompt has passed."""
    filled: int = 0
    """Tokens whose keys and values are there."""
    digest: bytes | None = None
    """Of all tokens up to its end, where it is full and no other page is known by it."""


def digest_of(parent: bytes, tokens: Sequence[int]) -> bytes:
    """BLAKE2b, 128 bits, of the tokens before a page, as their digest, and its own."""
    return hashlib.blake2b(parent + np.asarray(tokens, np.int64).tobytes(), digest_size=16).digest()


class PagePool:
    """`pages` pages of `page_size` tokens; see the module. copies: False, and only full pages are taken over."""

    def __init__(self, pages: int, page_size: int, *, copies: bool = True):
        self.page_size, self.copies = page_size, copies
        self._pages = [_Page() for _ in range(pages)]
        self._unused: OrderedDict[int, None] = OrderedDict((page, None) for page in range(pages))  # the next to go first
        self._known: dict[bytes, int] = {}
        self._children: dict[bytes, set[int]] = {}

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def free(self) -> int:
        """Pages nobody uses, whatever they still hold."""
        return len(self._unused)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    # --- jobs come and go ---

    def lease(self, prompt: Sequence[int], tokens: int, salt: bytes = b"") -> Lease | None:
        """Pages for `tokens` tokens that begin with `prompt`; None where too few are free: nothing has changed then.

        The prompt's last token is never taken over: something must be fed to draw the next. MustWait where a job that is
        being prefilled will have pages of this prompt.
        """
        size, body = self.page_size, list(prompt[:-1])
        parents = self._parents(body, salt)
        found = self._matching(body, parents)
        source, count = self._best_start(body, parents, len(found)) if self.copies else (None, 0)
        needed = self.pages_for(tokens) - len(found)
        free = len(self._unused) - sum(self._pages[page].users == 0 for page in found)
        if needed > free:
            return None
        for page in found:
            self._use(page)
        # The page copied from goes last, and where it must go it is its own copy.
        is_spare = source is not None and self._pages[source].users == 0
        if is_spare:
            self._unused.move_to_end(source)
        kept = self._pages[source].tokens[:count] if source is not None else ()
        taken = [self._take() for _ in range(needed)]
        copied = None
        if source is not None:
            if source in taken:
                at = taken.index(source)
                taken[0], taken[at] = taken[at], taken[0]
            else:
                copied = (source, taken[0])
                if is_spare:
                    self._unused.move_to_end(source)
        lease = Lease([*found, *taken], len(found) * size + count, copied, parents)
        for index in range(len(found), min(self.pages_for(len(body)), len(lease.pages))):
            page = self._pages[lease.pages[index]]
            page.filled = 0
            self._describe(lease.pages[index], parents[index], tuple(body[index * size : (index + 1) * size]))
        if source is not None:
            self._pages[taken[0]].filled = len(kept)
        return lease

    def fill(self, lease: Lease, tokens: Sequence[int], count: int) -> None:
        """The first `count` tokens of a lease have their keys and values: others may find them now."""
        size = self.page_size
        for index in range(len(lease.pages)):
            begin, end = index * size, min((index + 1) * size, count)
            if end <= begin:
                break
            page = self._pages[lease.pages[index]]
            if page.digest is not None or (page.filled >= size and index + 1 < len(lease.parents)):
                continue
            while len(lease.parents) <= index:
                known = len(lease.parents)
                lease.parents.append(digest_of(lease.parents[-1], tokens[(known - 1) * size : known * size]))
            held = tuple(tokens[begin:end])
            if page.parent != lease.parents[index] or page.tokens[: len(held)] != held:
                self._describe(lease.pages[index], lease.parents[index], held)
            page.filled = len(held)
            if len(held) == size:
                digest = digest_of(lease.parents[index], held)
                if len(lease.parents) == index + 1:
                    lease.parents.append(digest)
                if digest not in self._known:
                    self._known[digest], page.digest = lease.pages[index], digest

    def release(self, lease: Lease) -> None:
        """Give the pages back. Those that hold something known keep it until they are needed."""
        # The end of a text goes before its beginning: a page without those before it is of no use.
        for page in reversed(lease.pages):
            info = self._pages[page]
            info.users -= 1
            if info.users:
                continue
            is_worthless = info.parent is None or not info.filled
            if not is_worthless and info.digest is None and info.filled == self.page_size:
                is_worthless = True  # the twin of a page that is known
            if is_worthless:
                self._forget(page)
            elif info.filled < len(info.tokens):
                info.tokens = info.tokens[: info.filled]  # its prompt was given up halfway
            self._unused[page] = None
            self._unused.move_to_end(page, last=not is_worthless)
        lease.pages = []

    def forget(self) -> None:
        """Nobody finds what is held so far; jobs keep their pages."""
        for page in range(len(self._pages)):
            self._forget(page)

    # --- looking things up ---

    def _parents(self, body: list[int], salt: bytes) -> list[bytes]:
        digests = [digest_of(b"", [len(salt), *salt])]
        for begin in range(0, len(body) - self.page_size + 1, self.page_size):
            digests.append(digest_of(digests[-1], body[begin : begin + self.page_size]))
        return digests

    def _matching(self, body: list[int], parents: list[bytes]) -> list[int]:
        """The pages that hold the full pages at the start of `body`."""
        found: list[int] = []
        for index, digest in enumerate(parents[1:]):
            if digest not in self._known:
                begin = index * self.page_size
                self._wait_for(parents[index], tuple(body[begin : begin + self.page_size]))
                break
            found.append(self._known[digest])
        return found

    def _wait_for(self, parent: bytes, tokens: tuple[int, ...]) -> None:
        for page in self._children.get(parent, ()):
            info = self._pages[page]
            if info.users and info.filled < self.page_size and info.tokens == tokens:
                raise MustWait

    def _best_start(self, body: list[int], parents: list[bytes], index: int) -> tuple[int | None, int]:
        """The page that shares the most tokens with page `index` of `body`, and how many; of equals the first."""
        wanted = tuple(body[index * self.page_size : (index + 1) * self.page_size])
        best, most = None, LEAST_COPIED - 1
        for page in sorted(self._children.get(parents[index], ())):
            info = self._pages[page]
            common = common_length(info.tokens, wanted)
            if common > most and info.users and info.filled < common and common >= self.page_size // 4:
                raise MustWait
            common = min(common, info.filled)
            if common > most:
                best, most = page, common
        return best, most if best is not None else 0

    # --- single pages ---

    def _use(self, page: int) -> None:
        self._pages[page].users += 1
        self._unused.pop(page, None)

    def _take(self) -> int:
        page, _ = self._unused.popitem(last=False)
        self._forget(page)
        self._pages[page].users = 1
        return page

    def _describe(self, page: int, parent: bytes, tokens: tuple[int, ...]) -> None:
        info = self._pages[page]
        if info.parent != parent:
            self._forget_parent(page)
            info.parent = parent
            self._children.setdefault(parent, set()).add(page)
        info.tokens = tokens

    def _forget(self, page: int) -> None:
        info = self._pages[page]
        if info.digest is not None:
            del self._known[info.digest]
        self._forget_parent(page)
        info.digest, info.tokens, info.filled = None, (), 0

    def _forget_parent(self, page: int) -> None:
        info = self._pages[page]
        if info.parent is not None:
            siblings = self._children[info.parent]
            siblings.discard(page)
            if not siblings:
                del self._children[info.parent]
        info.parent = None

    # --- order ---

    def defragment(self) -> list[list[int]]:
        """Number the unused pages anew, texts in one piece -> cycles, as `cache_rotate` takes them, for the arrays.

        ValueError while a job has pages.
        """
        if len(self._unused) != len(self._pages):
            used = len(self._pages) - len(self._unused)
            raise ValueError(f"{used} pages are in use: put pages in order when no job has any")
        sources = self._by_text()
        places = {source: place for place, source in enumerate(sources)}
        self._pages = [self._pages[source] for source in sources]
        self._unused = OrderedDict((places[page], None) for page in self._unused)
        self._known = {digest: places[page] for digest, page in self._known.items()}
        self._children = {parent: {places[page] for page in pages} for parent, pages in self._children.items()}
        return cycles_of(sources)

    def _by_text(self) -> list[int]:
        """All pages, each behind the one whose text it goes on with."""
        order: list[int] = []
        starts = sorted(
            page for page, info in enumerate(self._pages) if info.parent is not None and info.parent not in self._known
        )
        waiting = starts[::-1]
        while waiting:
            page = waiting.pop()
            order.append(page)
            digest = self._pages[page].digest
            if digest is not None:
                waiting += sorted(self._children.get(digest, ()), reverse=True)
        held = set(order)
        return order + [page for page in range(len(self._pages)) if page not in held]


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Leading tokens that two texts have in common."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
