"""The pool of KV pages: a free list and reference counts. Plain Python; the pages' contents live in `engine/cache`."""

from __future__ import annotations

from collections.abc import Iterable

TRASH_PAGE = 0  # padding rows write here; it is never handed out


class PagePool:
    """Pages 1 .. total of a pool; page 0 is the trash page. A page is free when its reference count is 0."""

    def __init__(self, total: int) -> None:
        """`total` pages that can be handed out (the arrays hold total + 1)."""
        if total < 1:
            raise ValueError(f"a page pool needs at least one page, found {total}")
        self.total = total
        self._free = list(range(total, 0, -1))  # a stack: the page freed last is handed out first
        self._refs = [0] * (total + 1)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one reference each. Raises MemoryError, and takes none, when fewer are free."""
        if count > len(self._free):
            raise MemoryError(f"{count} pages asked, {len(self._free)} of {self.total} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference on pages that are in use. Raises ValueError for a free page."""
        for page in pages:
            if page == TRASH_PAGE or self._refs[page] < 1:
                raise ValueError(f"page {page} is not in use and cannot be shared")
            self._refs[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference less; a page without references is free again. Raises ValueError for a free page."""
        for page in pages:
            if page == TRASH_PAGE or self._refs[page] < 1:
                raise ValueError(f"page {page} is released more often than it was taken")
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._free.append(page)

    def references(self, page: int) -> int:
        return self._refs[page]
