"""The pool of KV pages: reference counts, a free list, and the prefix cache. Plain Python; what the pages hold lives in
`engine/cache`.

A full page may be given a name that says which tokens it holds and which came before them (`engine/prefix`). A named
page that nobody uses any more stays findable until its room is wanted: the one unused for longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

TRASH_PAGE = 0  # padding rows write here; it is never handed out


class PagePool:
    """Pages 1 .. total of a pool; page 0 is the trash page. A page with references is in use; any other is free,
    whether it is empty or still holds a named prefix."""

    def __init__(self, total: int) -> None:
        """`total` pages that can be handed out (the arrays hold total + 1)."""
        if total < 1:
            raise ValueError(f"a page pool needs at least one page, found {total}")
        self.total = total
        self._empty = list(range(total, 0, -1))  # a stack: the page freed last is handed out first
        self._refs = [0] * (total + 1)
        self._name: list[bytes | None] = [None] * (total + 1)
        self._named: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # named pages without references, unused for longest first
        self.evictions = 0

    @property
    def free(self) -> int:
        """Pages that `allocate` can hand out."""
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        return self.total - self.free

    @property
    def cached(self) -> int:
        """Free pages that still hold a named prefix."""
        return len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one reference each. Raises MemoryError, and takes none, when fewer are free."""
        if count > self.free:
            raise MemoryError(f"{count} pages asked, {self.free} of {self.total} free")
        pages = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference on pages that are in use. Raises ValueError for a free page."""
        for page in pages:
            if page == TRASH_PAGE or self._refs[page] < 1:
                raise ValueError(f"page {page} is not in use and cannot be shared")
            self._refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference less; a page without references is free again. Raises ValueError for a free page.

        `pages` in the order of positions: the last one is forgotten first, for a prefix without its beginning is of
        no use.
        """
        for page in reversed(pages):
            if page == TRASH_PAGE or self._refs[page] < 1:
                raise ValueError(f"page {page} is released more often than it was taken")
            self._refs[page] -= 1
            if self._refs[page]:
                continue
            if self._name[page] is None:
                self._empty.append(page)
            else:
                self._idle[page] = None

    def references(self, page: int) -> int:
        return self._refs[page]

    def name(self, page: int, name: bytes) -> None:
        """Makes a page that is in use, full and never written again findable. The first page of a name keeps it."""
        if page == TRASH_PAGE or self._refs[page] < 1:
            raise ValueError(f"page {page} is not in use and cannot be named")
        if self._name[page] is None and name not in self._named:
            self._name[page] = name
            self._named[name] = page

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The pages of the longest run of `names`, from the first on, that are known. Takes no reference."""
        found = []
        for name in names:
            page = self._named.get(name)
            if page is None:
                break
            found.append(page)
        return found

    def idle(self, pages: Iterable[int]) -> int:
        """How many of these (found) pages have no reference: taking them leaves that many fewer free."""
        return sum(not self._refs[page] for page in pages)

    def take(self, pages: Iterable[int]) -> None:
        """One reference on each page that `find` gave."""
        for page in pages:
            if self._name[page] is None:
                raise ValueError(f"page {page} has no name and cannot be taken")
            if not self._refs[page]:
                del self._idle[page]
            self._refs[page] += 1

    def forget(self, pages: Iterable[int] | None = None) -> None:
        """Unnames pages (None: all): what they hold is no longer what the name says."""
        for page in list(self._named.values()) if pages is None else pages:
            name = self._name[page]
            if name is None:
                continue
            self._name[page] = None
            del self._named[name]
            if not self._refs[page]:
                del self._idle[page]
                self._empty.append(page)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        name = self._name[page]
        assert name is not None
        self._name[page] = None
        del self._named[name]
        self.evictions += 1
        return page
