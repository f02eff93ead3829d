# SPDX-License-Identifier: GPL-2.0-only
r"""KVM's unsync walk as a model that runs: one file, to be read beside its thread.

Without EPT or NPT, or for a nested guest, KVM shadows a guest's page tables.  After a
write fault that mmu_try_to_unsync_pages() allows, the guest writes a table of level 1
freely, and its shadow page drifts: it is *unsync*.  When the guest flushes its TLB, KVM
must find every unsync page below a root, and sync it with the guest's table or zap it.
Miss one, and a stale translation stays in use.  A bit for each SPTE shows the way:

             level 3    unsync_child_bitmap {0, 7}
             /        \
        [0] /          \ [7]
         level 2 {4}    level 2 {4, 5}      shadow pages form a DAG:
             \          /    \              the left level-1 page has two
          [4] \    [4] /      \ [5]         parents, its bit is set in both
               level 1        level 1, both unsync

* A set bit promises little: an unsync page *may* be behind it.  It can be stale.
* A clear bit promises that none is, except what a walk has put in its array already.
* Hence the contract: before it drops mmu_lock, the caller must sync or zap *every* page
  in the array, also when the walk returned -ENOSPC because the array is full.

In 2022 a patch proposed that the walk clear the bit of a page which it is about to add
to the array.  Its review (YtcLiNskPb8z/2Qc@google.com) asked: what if the add fails?

What KVM has (arch/x86/kvm/mmu/, Linux 5.19) keeps its name: `sp`, a shadow page; `ent`,
an SPTE; `i`, `idx` or `index`, its place; `pvec`, an array.  But __mmu_unsync_walk() is
the review's __mmu_unsync_walk_and_clear(), and its callers fit it; walk_before() and
linux_caller() are Linux's.  A bad argument changes nothing, and raises IndexError (an
SPTE outside 0..511), OverflowError (KVM would write past its array), ValueError (KVM
would WARN, miscount or not check), TypeError or AttributeError (not such a thing).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from errno import EINTR, ENOSPC
from functools import partial
from itertools import compress, count, cycle, dropwhile, product, takewhile
from operator import index as as_int
from typing import Any, NamedTuple

PG_LEVEL_4K, PG_LEVEL_2M, PG_LEVEL_1G, PT64_ROOT_MAX_LEVEL = 1, 2, 3, 5
# The first two of these are still PT64_LEVEL_BITS and PT64_ENT_PER_PAGE in 5.19.
SPTE_LEVEL_BITS, SPTE_ENT_PER_PAGE, PAGE_SHIFT = 9, 512, 12
KVM_PAGE_ARRAY_NR, INVALID_INDEX = 16, -1

Walk = Callable[["kvm_mmu_page", "kvm_mmu_pages"], int]
Caller = Callable[["kvm_mmu_page", "kvm_mmu_pages", Walk], object]
ParentPtes = list[tuple["kvm_mmu_page", int]]

# ------------------------------------------------------------------ shadow pages

# An SPTE is this, None (not present), or the page that it points at.
LARGE_SPTE = "large SPTE"


class kvm_mmu_page:
    """A shadow page of `level` 1 to 5.  (struct kvm_mmu_page)

    `spt[i]` is SPTE i; level 1 has none here.  `parent_ptes` has the SPTEs that point
    here, as (page, index).  `unsync_children` counts the bits that are set in
    `unsync_child_bitmap`.  Only level 1 can be `unsync`.  `gfn` (52 bits) only labels.
    """

    __slots__ = ("gfn", "level", "parent_ptes", "spt", "unsync",
                 "unsync_child_bitmap", "unsync_children")  # fmt: skip

    def __init__(self, level: int, gfn: int = 0) -> None:
        self.level = within("a level", level, PG_LEVEL_4K, PT64_ROOT_MAX_LEVEL)
        self.gfn = within("a gfn", gfn, 0, (1 << 52) - 1)
        self.spt = Sptes([None] * SPTE_ENT_PER_PAGE if level > PG_LEVEL_4K else [])
        self.parent_ptes: ParentPtes = []
        self.unsync = False
        self.unsync_children = 0
        self.unsync_child_bitmap = 0

    def __repr__(self) -> str:
        return f"kvm_mmu_page({self.level}, {self.gfn:#x})"


def is_shadow_present_pte(ent: object) -> bool:
    """Whether an SPTE is present: large, or pointing at a shadow page."""
    return ent is not None


def is_large_pte(ent: object) -> bool:
    """Whether an SPTE is a large leaf, with no shadow page below it."""
    return ent is LARGE_SPTE


def to_shadow_page(ent: kvm_mmu_page) -> kvm_mmu_page:
    """Return the page that an SPTE points at.  By this a walk *looks* at a child."""
    trace("look", ent)
    return ent


# ----------------------------------------------------------------------- marking


def kvm_unsync_page(sp: kvm_mmu_page) -> None:
    """Make `sp`, of level 1, unsync and findable: the guest may write its table now."""
    if sp.level != PG_LEVEL_4K:
        raise ValueError(f"only a page of level 1 can be unsync, not {sp}")
    sp.unsync = True
    kvm_mmu_mark_parents_unsync(sp)


def kvm_mmu_mark_parents_unsync(sp: kvm_mmu_page) -> None:
    """Mark every SPTE that points at `sp`."""
    for parent, i in sp.parent_ptes:
        mark_unsync(parent, i)


def mark_unsync(sp: kvm_mmu_page, index: int) -> None:
    """Set bit `index` (0..511) of `sp`; if it is the first, mark the SPTEs to `sp`."""
    index = need_spte(sp, index)
    if sp.unsync_child_bitmap & 1 << index:
        return
    sp.unsync_child_bitmap |= 1 << index
    sp.unsync_children += 1
    if sp.unsync_children > 1:
        return
    kvm_mmu_mark_parents_unsync(sp)


def clear_unsync_child_bit(sp: kvm_mmu_page, index: int) -> None:
    """Clear bit `index` (0..511) of `sp`, which must be set; `sp` alone changes."""
    index = need_spte(sp, index)
    if not sp.unsync_child_bitmap & 1 << index or sp.unsync_children < 1:
        raise ValueError(f"bit {index} of {sp} is clear already: clear only a set bit")
    sp.unsync_children -= 1
    sp.unsync_child_bitmap ^= 1 << index
    trace("clear", sp, index)


# --------------------------------------------------------------------- the array


class kvm_mmu_pages:
    """The array that a walk fills, up to `capacity`: pages, `sp`; indexes, `idx`."""

    def __init__(self, capacity: int = KVM_PAGE_ARRAY_NR) -> None:
        self.capacity = within("a capacity", capacity, 1, sys.maxsize)
        self.sp: list[kvm_mmu_page] = []
        self.idx: list[int] = []

    def __repr__(self) -> str:
        return f"{self.nr} of {self.capacity} entries: {', '.join(map(repr, self.sp))}"

    @property
    def nr(self) -> int:
        return len(self.sp)

    def store(self, sp: kvm_mmu_page, idx: int = INVALID_INDEX) -> bool:
        """Store `sp`, and only then say whether the array is full, as KVM does."""
        if self.nr >= self.capacity:
            trace("overrun", sp, self)
            raise OverflowError(f"all {self.nr} entries are used: return -ENOSPC first")
        self.sp.append(sp)
        self.idx.append(idx)
        trace("add", sp, self)
        return self.nr == self.capacity


def mmu_pages_add(pvec: kvm_mmu_pages, sp: kvm_mmu_page, idx: int = -1) -> bool:
    """Store `sp`, unless it is unsync and there already; true if that filled the array.

    True does *not* say that there was no room for `sp`: see the thread's answer,
    CAJhGHyAoM+6cOh7XQUvavgJcUts53FW6BnjM_wqMD6fkoYoB3w@mail.gmail.com.
    """
    if sp.unsync and sp in pvec.sp:
        trace("again", sp, pvec)
        return False
    return pvec.store(sp, idx)


# ---------------------------------------------------------------------- the walk


def __mmu_unsync_walk(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
    """Add the unsync pages below `sp` to `pvec`, and clear the bits that it followed.

    Returns how often it came upon one, once for each SPTE that leads there, or -ENOSPC.
    """
    nr_unsync_leaf = 0

    for i in for_each_set_bit(sp.unsync_child_bitmap):
        ent = sp.spt[i]

        if is_shadow_present_pte(ent) and not is_large_pte(ent):
            child = to_shadow_page(ent)

            if child.unsync_children:
                ret = __mmu_unsync_walk(child, pvec)
                if ret < 0:
                    return ret
                nr_unsync_leaf += ret
            elif child.unsync:
                if mmu_pages_add(pvec, child):
                    return -ENOSPC
                nr_unsync_leaf += 1

        # All that is unsync behind this bit is in the array by now, or nothing was: the
        # bit was stale.  Before the caller drops mmu_lock it must sync or zap all the
        # array, *even on error*; and it can, as a sync that fails zaps the page.
        clear_unsync_child_bit(sp, i)

    return nr_unsync_leaf


def for_each_set_bit(bitmap: int) -> Iterator[int]:
    """Yield the indexes of the bits that are set in `bitmap` (0 or more), rising.

    The kernel's macro reads the bitmap as it goes, this reads it at the start: the same
    to a walk, which clears no bit of a page but the one that it is at.
    """
    trace("read", None)
    while bitmap > 0:
        lowest = bitmap & -bitmap
        yield lowest.bit_length() - 1
        bitmap ^= lowest


def mmu_unsync_walk(
    sp: kvm_mmu_page, pvec: kvm_mmu_pages, walk: Walk = __mmu_unsync_walk
) -> int:
    """Empty `pvec`, let `walk` fill it from below `sp`, and return what `walk` returns.

    A walk that gathers parents finds `sp` stored first.  Its array must have room for a
    page of each level, or it could fill up again and again before it comes to a leaf.
    """
    gathers = getattr(walk, "gathers_parents", False)
    if not callable(walk):
        raise TypeError(f"a walk must be a function such as walk_posted, not {walk!r}")
    if pvec.capacity < sp.level and gathers:
        raise ValueError(f"{sp} takes {sp.level} entries or more, not {pvec.capacity}")
    pvec.sp.clear()
    pvec.idx.clear()
    if not sp.unsync_children:
        return 0
    if gathers:
        mmu_pages_add(pvec, sp, INVALID_INDEX)
    return walk(sp, pvec)


# ------------------------------------------------------------------- the callers


def mmu_page_zap_pte(parent: kvm_mmu_page, index: int) -> None:
    """Make SPTE `index` (0..511) of `parent` not present; its bit stays as it is."""
    index = need_spte(parent, index)
    ent = parent.spt[index]
    if is_shadow_present_pte(ent) and not is_large_pte(ent):
        ent.parent_ptes.remove((parent, index))
    parent.spt[index] = None


def kvm_sync_page(sp: kvm_mmu_page) -> None:
    """Sync `sp`, which must be unsync; then it is not.

    5.19's leaves `unsync` to kvm_unlink_unsync_page(), which callers call first; not so
    kvm_mmu_get_page(), which syncs in passing.
    """
    if sp.level > PG_LEVEL_4K:
        raise ValueError(f"{sp} is a gathered parent: sync what for_each_sp() gives")
    if not sp.unsync:
        raise ValueError(f"{sp} is in sync: sync only a page that is unsync")
    trace("sync", sp)
    sp.unsync = False


def kvm_mmu_prepare_zap_page(sp: kvm_mmu_page) -> None:
    """Zap the unsync pages below `sp`, then unlink `sp` from children and parents."""
    trace("zap", sp)
    mmu_zap_unsync_children(sp)
    for i in range(len(sp.spt)):
        mmu_page_zap_pte(sp, i)
    for parent, i in list(sp.parent_ptes):
        mmu_page_zap_pte(parent, i)
    sp.unsync = False


def for_each_sp(pvec: kvm_mmu_pages) -> list[kvm_mmu_page]:
    """Return the level-1 pages of `pvec`, without parents that a walk gathered."""
    return [sp for sp in pvec.sp if sp.level == PG_LEVEL_4K]


def mmu_sync_children(
    parent: kvm_mmu_page,
    pvec: kvm_mmu_pages | None = None,
    walk: Walk = __mmu_unsync_walk,
) -> int:
    """Sync every unsync page below `parent`, an array at a time; return how many.

    -ENOSPC is not 0, so after it the loop goes on.  (KVM returns a status.)
    """
    pvec = kvm_mmu_pages() if pvec is None else pvec
    nr_synced = 0
    while mmu_unsync_walk(parent, pvec, walk):
        for sp in for_each_sp(pvec):
            kvm_sync_page(sp)
            nr_synced += 1
    return nr_synced


def mmu_zap_unsync_children(
    parent: kvm_mmu_page,
    pvec: kvm_mmu_pages | None = None,
    walk: Walk = __mmu_unsync_walk,
) -> int:
    """Zap every unsync page below `parent`, an array at a time; return how many."""
    pvec = kvm_mmu_pages() if pvec is None else pvec
    zapped = 0
    while mmu_unsync_walk(parent, pvec, walk):
        for sp in for_each_sp(pvec):
            kvm_mmu_prepare_zap_page(sp)
            zapped += 1
    return zapped


# ================================================== the other walks of the thread
# From here on names are the model's, except where they are said to be KVM's.


def gathers_parents(walk: Walk) -> Walk:
    """Mark `walk` as one that stores parents too; mmu_unsync_walk() stores the root."""
    walk.gathers_parents = True  # type: ignore[attr-defined]
    return walk


@gathers_parents
def walk_before(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
    """`before`: the walk that 05/12 changes.  A later mainline still has it."""
    nr_unsync_leaf = 0

    for i in for_each_set_bit(sp.unsync_child_bitmap):
        ent = sp.spt[i]

        if not is_shadow_present_pte(ent) or is_large_pte(ent):
            clear_unsync_child_bit(sp, i)
            continue

        child = to_shadow_page(ent)

        if child.unsync_children:
            if mmu_pages_add(pvec, child, i):
                return -ENOSPC

            ret = walk_before(child, pvec)
            if not ret:
                clear_unsync_child_bit(sp, i)
                continue
            elif ret > 0:
                nr_unsync_leaf += ret
            else:
                return ret
        elif child.unsync:
            # Counted and added, but the bit stays: this is what 05/12 is about.
            nr_unsync_leaf += 1
            if mmu_pages_add(pvec, child, i):
                return -ENOSPC
        else:
            clear_unsync_child_bit(sp, i)

    return nr_unsync_leaf


@gathers_parents
def walk_posted(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
    """`posted`: 05/12, 20220605064342.309219-6-jiangshanlai@gmail.com."""
    nr_unsync_leaf = 0

    for i in for_each_set_bit(sp.unsync_child_bitmap):
        ent = sp.spt[i]

        if not is_shadow_present_pte(ent) or is_large_pte(ent):
            clear_unsync_child_bit(sp, i)
            continue

        child = to_shadow_page(ent)

        if child.unsync_children:
            if mmu_pages_add(pvec, child, i):
                return -ENOSPC

            ret = walk_posted(child, pvec)
            if ret < 0:
                return ret
            nr_unsync_leaf += ret

        # The same contract; but the bit goes *before* the add: the review's question.
        clear_unsync_child_bit(sp, i)
        if child.unsync:
            nr_unsync_leaf += 1
            if mmu_pages_add(pvec, child, i):
                return -ENOSPC

    return nr_unsync_leaf


def walk_series_end(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
    """`series-end`: after 12/12.  As `posted`; no parents (10/12), no index (08/12)."""
    nr_unsync_leaf = 0

    for i in for_each_set_bit(sp.unsync_child_bitmap):
        ent = sp.spt[i]

        if not is_shadow_present_pte(ent) or is_large_pte(ent):
            clear_unsync_child_bit(sp, i)
            continue

        child = to_shadow_page(ent)

        if child.unsync_children:
            ret = walk_series_end(child, pvec)
            if ret < 0:
                return ret
            nr_unsync_leaf += ret

        clear_unsync_child_bit(sp, i)
        if child.unsync:
            nr_unsync_leaf += 1
            if mmu_pages_add(pvec, child):
                return -ENOSPC

    return nr_unsync_leaf


def mmu_is_page_vec_full(pvec: kvm_mmu_pages) -> bool:
    """Whether there is no room for a page.  The resolution's; it is not in Linux."""
    return pvec.nr >= pvec.capacity


@gathers_parents
def walk_check_first(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
    """`check-first`: what the resolution asks for, Ytl+Tn8YBQR3KQFM@google.com."""
    nr_unsync_leaf = 0

    for i in for_each_set_bit(sp.unsync_child_bitmap):
        ent = sp.spt[i]

        if not is_shadow_present_pte(ent) or is_large_pte(ent):
            clear_unsync_child_bit(sp, i)  # in the C a goto to the clear below
            continue

        child = to_shadow_page(ent)
        if not child.unsync and not child.unsync_children:
            clear_unsync_child_bit(sp, i)  # the same
            continue

        if mmu_is_page_vec_full(pvec):
            return -ENOSPC

        mmu_pages_add(pvec, child, i)

        if child.unsync_children:
            ret = walk_check_first(child, pvec)
            if ret < 0:
                return ret
            nr_unsync_leaf += ret
        else:
            nr_unsync_leaf += 1

        # The same contract.
        clear_unsync_child_bit(sp, i)

    return nr_unsync_leaf


# ------------------------------------------------------ Linux, which never took 05/12


def for_each_sp_path(pvec: kvm_mmu_pages) -> list[tuple[kvm_mmu_page, ParentPtes]]:
    """Return each level-1 page with its mmu_page_path: (page, index) from below."""
    found, parent, idx = [], dict[int, kvm_mmu_page](), dict[int, int]()
    top = pvec.sp[0].level if pvec.sp else PG_LEVEL_4K
    for sp, i in zip(pvec.sp, pvec.idx + [INVALID_INDEX] * pvec.nr):
        parent[sp.level], idx[sp.level] = sp, i
        if i < 0 and sp.level < top or sp.level == PG_LEVEL_4K and len(parent) < top:
            raise ValueError(f"{pvec} misses parents of {sp}, or indexes: add all")
        if sp.level == PG_LEVEL_4K:
            found.append((sp, [(parent[n + 1], idx[n]) for n in range(1, top)]))
    return found


def mmu_pages_clear_parents(parents: ParentPtes) -> None:
    """Clear the bit of each of `parents`, up to one that has others set.  (KVM's)"""
    for sp, i in parents:
        clear_unsync_child_bit(sp, i)
        if sp.unsync_children:
            break


def linux_caller(settle: Callable[[kvm_mmu_page], None]) -> Caller:
    """Return a caller as Linux has it, which deals with a page by `settle`."""

    def caller(parent: kvm_mmu_page, pvec: kvm_mmu_pages, walk: Walk) -> None:
        while mmu_unsync_walk(parent, pvec, walk):
            for sp, parents in for_each_sp_path(pvec):
                settle(sp)
                mmu_pages_clear_parents(parents)

    return caller


# ============================================================== building and drawing


def within(what: str, value: int, low: int, high: int) -> int:
    """Return `value` as an int; refuse what is not one from `low` to `high`."""
    if not low <= as_int(value) <= high:
        raise ValueError(f"{what} must be {low} to {high}, not {value}")
    return as_int(value)


def need_spte(parent: kvm_mmu_page, index: int) -> int:
    """Return `index` as an int; refuse it outside 0..511, or at a page of level 1."""
    if parent.level == PG_LEVEL_4K:
        raise ValueError(f"{parent} has no children: give a page above level 1")
    if not 0 <= as_int(index) < SPTE_ENT_PER_PAGE:
        raise IndexError(f"the index of an SPTE must be 0 to 511, not {index}")
    return as_int(index)


class Sptes(list[Any]):
    """The SPTEs of a page: a list of which [-1] cannot be read."""

    def __getitem__(self, i: Any) -> Any:
        trace("read", None)
        if not isinstance(i, slice) and i < 0:
            raise IndexError(f"the index of an SPTE must be 0 to 511, not {i}")
        return list.__getitem__(self, i)


def link_shadow_page(parent: kvm_mmu_page, index: int, child: kvm_mmu_page) -> None:
    """Let SPTE `index` (0..511) of `parent` point at `child`, one level below.  (KVM's)

    A large SPTE is replaced (5.19 drops it first), a child is not.  The way to a page
    that is unsync, or has unsync children, is marked.
    """
    index = need_spte(parent, index)
    ent = parent.spt[index]
    if child.level != parent.level - 1:
        raise ValueError(f"{child} is not of the level below {parent}")
    if is_shadow_present_pte(ent) and not is_large_pte(ent):
        raise ValueError(f"SPTE {index} of {parent} points at {ent}: zap it first")
    parent.spt[index] = child
    child.parent_ptes.append((parent, index))
    if child.unsync_children or child.unsync:
        mark_unsync(parent, index)


def set_large_spte(parent: kvm_mmu_page, index: int) -> None:
    """Unlink SPTE `index` (0..511) of `parent`, level 2 or 3; make it a large leaf."""
    within("the level of a large SPTE", parent.level, PG_LEVEL_2M, PG_LEVEL_1G)
    mmu_page_zap_pte(parent, index)
    parent.spt[index] = LARGE_SPTE


def shadow_page_at(root: kvm_mmu_page, gva: int) -> kvm_mmu_page:
    """Return the level-1 page below `root` that translates address `gva` of the guest.

    Missing pages are linked, and labelled by the first address they translate, >> 12.
    `gva`, in bytes, has 12 + 9 * level bits, sign-extended to 64 with 4 or 5 levels.
    """
    gva, bits = as_int(gva), PAGE_SHIFT + SPTE_LEVEL_BITS * root.level
    if root.level < 4:
        within(f"an address of {bits} bits", gva, 0, (1 << bits) - 1)
    elif not 0 <= (gva + (1 << bits - 1)) % (1 << 64) < 1 << bits or gva >> 64:
        raise ValueError(f"{gva:#x} is not canonical: its sign is to fill 64 bits")
    sp = root
    while sp.level > PG_LEVEL_4K:
        shift = PAGE_SHIFT + SPTE_LEVEL_BITS * (sp.level - 1)
        i = gva >> shift & SPTE_ENT_PER_PAGE - 1
        if is_large_pte(sp.spt[i]):
            raise ValueError(f"{gva:#x} is in large SPTE {i} of {sp}: zap it first")
        if not is_shadow_present_pte(sp.spt[i]):
            frame = gva >> shift << shift - PAGE_SHIFT
            link_shadow_page(sp, i, kvm_mmu_page(sp.level - 1, frame))
        sp = sp.spt[i]
    return sp


Names = dict[kvm_mmu_page, str]


def below(root: kvm_mmu_page) -> list[kvm_mmu_page]:
    """Return `root` and the pages below it."""
    found = [root]
    for sp in found:
        pages = [ent for ent in dict.fromkeys(sp.spt) if isinstance(ent, kvm_mmu_page)]
        found += [page for page in pages if page not in found]
    return found


def described(ent: Any, names: Names) -> str:
    """Say what an SPTE holds, or what a page is."""
    if not isinstance(ent, kvm_mmu_page):
        return "large" if is_large_pte(ent) else "not present"
    name = f"level {ent.level}" + (f", {names[ent]}" if ent in names else "")
    if ent.level > PG_LEVEL_4K:
        return f"{name}, unsync_children {ent.unsync_children}"
    return f"{name}, {'unsync' if ent.unsync else 'in sync'}"


def draw(root: Any, names: Names | None = None, seen: Names | None = None) -> str:
    """Return an ASCII tree: SPTE i as [i], or [i*] if its bit is set; pages by `names`.

    What is below a page is drawn once, and not if it is in `seen`.
    """
    names, seen = names or {}, {} if seen is None else seen
    bits, spt = getattr(root, "unsync_child_bitmap", 0), getattr(root, "spt", ())
    slots = [i for i, ent in enumerate(spt) if ent is not None or bits >> i & 1]
    again = root in seen and slots != []
    seen[root] = ""
    lines = [described(root, names) + ", as above" * again]
    for i in slots * (not again):
        fork, margin = ("`-", "  ") if i == slots[-1] else ("|-", "| ")
        first, *rest = draw(spt[i], names, seen).splitlines()
        lines += [f"{fork}[{i}{' *'[bits >> i & 1]}] {first}"]
        lines += [margin + line for line in rest]
    return "\n".join(lines)


def columns(rows: Iterable[Iterable[object]]) -> str:
    """Return `rows` of cells in columns: to the left where the last row has words."""
    table = [[*row] for row in rows]
    wide = [max(len(str(cell)) for cell in column) for column in zip(*table)]
    sides = ["<" if isinstance(cell, str) else ">" for cell in table[-1]]
    cells = [[f"{c!s:{s}{w}}" for c, s, w in zip(row, sides, wide)] for row in table]
    return "\n".join("  ".join(row).rstrip() for row in cells)


# =================================================================== a recorded run
# What a walk and its caller do, they do by the functions above, and these tell: "look",
# "add" (or "again", "refused", "overrun"), "clear", "sync", "zap"; "read" only counts.

watchers: list[Callable[[str, Any, Any], None]] = []
ADDS = {
    "again": "there already",
    "refused": "refused, the array is full",
    "overrun": "past the end of the array",
}


def trace(what: str, sp: kvm_mmu_page | None, detail: Any = None) -> None:
    """Tell all watchers that `what` is done to page `sp`, at an index or an array."""
    for see in watchers:
        see(what, sp, detail)


class Run:
    """A walk, recorded: in `with run:`, hand it to a caller in place of the walk.

    `steps` has what was done so far, whether by the walk, and at which index, or with
    which array or result.  If `pages` are given, `lines` tells it, and `lost` has those
    that are unsync, but neither in the array nor findable, and since which line.
    """

    def __init__(
        self, walk: Walk, pvec: kvm_mmu_pages, names: Names, pages: list[kvm_mmu_page]
    ) -> None:
        self.walk, self.pvec, self.names, self.pages = walk, pvec, names, pages
        self.gathers_parents = getattr(walk, "gathers_parents", False)
        self.steps: list[tuple[str, bool, Any]] = []
        self.lines: list[str] = []
        self.lost: dict[kvm_mmu_page, int] = {}
        self.walking = False

    def __enter__(self) -> None:
        watchers.append(self.see)

    def __exit__(self, *error: object) -> None:
        watchers.remove(self.see)

    def __call__(self, root: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
        self.top, self.pvec = root.level, pvec
        self.see("walk", root)
        self.walking = True
        ret = self.walk(root, pvec)
        self.walking = False
        self.see("return", root, ret)
        return ret

    def see(self, what: str, sp: Any, detail: Any = None) -> None:
        if what == "read":
            return
        self.steps.append((what, self.walking, detail))
        if self.pages:
            self.lines.append(self.told(what, sp, detail))
            rest = [sp for sp in self.pages if sp not in self.pvec.sp]
            lost = [sp for sp in rest if findable([sp], {})]
            self.lost = {sp: self.lost.get(sp, len(self.lines)) for sp in lost}

    def told(self, what: str, sp: Any, detail: Any) -> str:
        """Return the line for a step, indented by level."""
        text = self.names.get(sp, f"level {sp.level}, label {sp.gfn:#x}")
        depth = self.top - sp.level if self.walking else 0
        if what in ("walk", "look"):
            text = described(sp, self.names)
        elif what == "clear":
            owner = f" of {text}" if sp in self.names else ""
            text, depth = f"[{detail}]{owner}: {sp.unsync_children} left", depth + 1
        elif what in ADDS:
            what, text = "add", f"{text}: {ADDS[what]}"
        elif what == "add":
            full = ", the array is full now" * mmu_is_page_vec_full(detail)
            text += f": entry {detail.nr} of {detail.capacity}{full}"
        elif what in ("return", "done"):
            errors = {str(-ENOSPC): "-ENOSPC", str(-EINTR): "-EINTR"}
            text = errors.get(str(detail), str(detail) if what == "return" else "")
        elif what == "set":
            text = f"[{detail}] of {text}: {described(sp.spt[detail], self.names)}"
        return f"{'  ' * depth}{what:6} {text}".rstrip()

    def __str__(self) -> str:
        lines = [*self.lines]
        for sp, after in self.lost.items():
            lines[after - 1] += f"   <-- {self.names.get(sp, repr(sp))} is lost"
        return "\n".join(lines)


def blame(error: BaseException) -> str:
    """Say what a walk or a caller raised, and where; a signal's error is raised on."""
    import signal
    import traceback

    handlers = map(signal.getsignal, signal.valid_signals())
    codes = [getattr(handler, "__code__", None) for handler in handlers]
    if any(f.f_code in codes for f, _ in traceback.walk_tb(error.__traceback__)):
        raise error
    stack = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in stack if frame.filename != __file__]
    where = f" (line {ours[-1].lineno}: {ours[-1].line})" if ours else ""
    said = traceback.format_exception_only(type(error), error)[-1].splitlines()[0]
    return f"{said}{where}"


def narrate(
    root: kvm_mmu_page,
    pvec: kvm_mmu_pages,
    names: Names | None = None,
    walk: Walk = __mmu_unsync_walk,
    caller: Caller | None = None,
) -> str:
    """Walk from `root`, and return a line for each step, indented by level.

    What the walk found is in `pvec` then, and is to be synced or zapped before another
    walk with any array: only this one knows of it.  A `caller` is followed to its end.
    """
    if not isinstance(names or {}, dict):
        raise TypeError(f"names must be a dict, not {names!r}: give a walk as walk=...")
    run = Run(walk, pvec, names or {}, below(root))
    try:
        with run:
            ret = (caller or mmu_unsync_walk)(root, pvec, run)
        if caller or not run.steps:
            run.lines += [run.told("done" if caller else "return", root, ret)]
    except (Exception, SystemExit) as error:
        if not run.steps:
            raise
        run.lines.append(f"raise  {blame(error)}")
    return str(run)


# ================================================================= what is promised
# Why `suggested` is right on tables of *any* size, in both readings of the array.  Safe
# is a page that is in sync, or stored, or whose bits are set all the way to the roots.
#  1. mmu_lock is held for write: from the start of a walk until its array is settled no
#     one else marks, links or zaps.
#  2. Before a walk all pages are safe (findable), and what has unsync children has its
#     bit set in each parent (test_history): so marking may stop there (marked).
#  3. A look changes nothing (untouched), an add helps, a clear can harm what is behind.
#  4. It is never early (test_readme): behind a bit that it clears is no page (absent,
#     large); one in sync without unsync children; one that is stored; or one whose
#     walk returned 0 or more, so that (5, a level below) none of its bits is set.
#  5. If it returns 0 or more it has cleared all bits of its page.  So, from the root,
#     all that is unsync is stored; as each page stored counts, 0 says none (returned).
#  6. -ENOSPC goes straight up.  Then the array is full (returned) of unsync pages
#     (gathered), and the caller settles them (settled): each walk leaves fewer.


def findable(pages: Iterable[kvm_mmu_page], names: Names) -> str:
    """An unsync page has its bit set in every parent, these in theirs, and so on.

    Returns what is wrong, or "".  This must hold whenever mmu_lock is free, so between
    two walks.  (INVLPG stops where unsync_children is 0: a lost bit harms it, too.)
    """
    todo = [sp for sp in pages if sp.unsync]
    for sp in todo:
        for parent, i in sp.parent_ptes:
            if not parent.unsync_child_bitmap >> i & 1:
                bit = f"[{i}] of {names.get(parent, parent)}"
                return f"findable: {bit} is clear, with an unsync page behind it"
            if parent not in todo:
                todo.append(parent)
    return ""


# ------------------------------------------------------------ and who may break it


class RefusingPages(kvm_mmu_pages):
    """The array as the review reads it: if it is full an add fails, and says so."""

    def store(self, sp: kvm_mmu_page, idx: int = INVALID_INDEX) -> bool:
        """Store `sp` and return false, or return true if there is no room for it."""
        if full := mmu_is_page_vec_full(self):
            trace("refused", sp, self)
        else:
            super().store(sp, idx)
        return full


def sync_with_failures(parent: kvm_mmu_page, pvec: kvm_mmu_pages, walk: Walk) -> None:
    """Sync, but every other sync fails; KVM's kvm_sync_page() then zaps the page."""
    while mmu_unsync_walk(parent, pvec, walk):
        for sp, fails in zip(for_each_sp(pvec), cycle((True, False))):
            kvm_sync_page(sp)
            if fails:
                kvm_mmu_prepare_zap_page(sp)


def sync_carelessly(parent: kvm_mmu_page, pvec: kvm_mmu_pages, walk: Walk) -> None:
    """Break the contract: drop what is in the array after -ENOSPC, and walk again."""
    while ret := mmu_unsync_walk(parent, pvec, walk):
        for sp in for_each_sp(pvec) if ret != -ENOSPC else ():
            kvm_sync_page(sp)


Arrays = dict[str, type[kvm_mmu_pages]]
ARRAYS: Arrays = {"KVM's": kvm_mmu_pages, "refusing": RefusingPages}
# Those that store parents come first: compare the costs of what stores the same.
WALKS: dict[str, Walk] = {
    "before": walk_before,
    "posted": walk_posted,
    "check-first": walk_check_first,
    "series-end": walk_series_end,
    "suggested": __mmu_unsync_walk,
}
CALLERS: dict[str, Caller] = {
    "sync": mmu_sync_children,
    "zap": mmu_zap_unsync_children,
    "failing": sync_with_failures,
    "careless": sync_carelessly,
}
LINUX_CALLERS: dict[str, Caller] = {
    "sync": linux_caller(kvm_sync_page),
    "zap": linux_caller(kvm_mmu_prepare_zap_page),
}
# Each walk, and Linux's, with its caller.
VARIANTS: dict[str, tuple[Walk, Caller]] = {
    "linux": (walk_before, LINUX_CALLERS["sync"]),
    **{label: (walk, mmu_sync_children) for label, walk in WALKS.items()},
}


# ======================================================================== tables

Row = tuple[int, ...]
Numbered = dict[int, kvm_mmu_page]
ABSENT, LARGE = -1, -2  # What an SPTE of a Table holds, if not a page.


class Table(NamedTuple):
    """A table as data: how it comes about.  Page 1000 * level + n is n-th of its level.

    `script` has, in order: (page, index, what it holds), an SPTE and its bit, whatever
    may be behind it; (page, index, what it holds, 0), an SPTE, its bit left to linking;
    (page,), a write by the guest, if the page has a parent by then; and (), where the
    caller deals with each root (a page above level 1 without a parent).  The writes
    after the first () come again at the second walk for each root, as if mmu_lock was
    dropped between two batches.  `size` is the array's (at least the root's level, if
    the walk stores parents), or 0: 1, 2, 3 and so on, till one does not fill up.

    >>> print(Table(((3000, 0, 2000), (3000, 9, 2000), (2000, 0, 1000, 0),
    ...              (2000, 1, ABSENT), (2000, 2, LARGE, 0), (2001, 511, 1000), ())))
    level 3, page 3000, unsync_children 2
    |-[0*] level 2, page 2000, unsync_children 1
    | |-[0 ] level 1, page 1000, in sync
    | |-[1*] not present
    | `-[2 ] large
    `-[9*] level 2, page 2000, unsync_children 1, as above
    level 2, page 2001, unsync_children 1
    `-[511*] level 1, page 1000, in sync
    """

    script: tuple[Row, ...]
    size: int = 0

    def build(self) -> Numbered:
        """Return new pages, by number, as they are at the first turn of a caller."""
        numbers = {n for row in self.script for n in row[:3:2] if n > 0}
        # Large gfns, each at two pages: no walk is to tell pages apart by them.
        pages = {
            n: kvm_mmu_page(n // 1000, gfn=n % 1000 // 2 * (1 << 33 | 1))
            for n in sorted(numbers, reverse=True)
        }
        for row in takewhile(len, self.script):
            change(pages, *row)
        return pages

    def __str__(self) -> str:
        names = {sp: f"page {number}" for number, sp in self.build().items()}
        roots, seen = [sp for sp in names if sp.spt and not sp.parent_ptes], Names()
        return "\n".join(draw(root, names, seen) for root in roots)


def change(pages: Numbered, page: int, *spte: int) -> bool:
    """Do to `pages` what a row of a script says; return whether there was a change."""
    sp = pages[page]
    if spte:
        i, ent, *alone = spte
        mmu_page_zap_pte(sp, i)
        if ent == LARGE:
            set_large_spte(sp, i)
        elif ent != ABSENT:
            link_shadow_page(sp, i, pages[ent])
        if not alone:
            mark_unsync(sp, i)
    elif sp.parent_ptes:
        kvm_unsync_page(sp)
    return bool(spte or sp.parent_ptes)


def small_tables(sptes: int) -> Iterator[Table]:
    """Yield every table of up to `sptes` SPTEs below a root of level 2, 3 or 4.

    All bits are set, many of them stale.  Pages are numbered as they come up.
    """
    grown: list[tuple[Row, tuple[Row, ...]]] = [((1000 * n,), ()) for n in (2, 3, 4)]
    for _ in range(sptes):
        smaller, grown = grown, []
        for pages, rows in smaller:
            at = pages.index(rows[-1][0]) if rows else 0
            for page in [page for page in pages[at:] if page >= 2000]:
                index, under = sum(row[0] == page for row in rows), page // 1000 - 1
                known = [number for number in pages if number // 1000 == under]
                new = under * 1000 + len(known)
                for ent in (*known, new, ABSENT, *[LARGE] * (under < PG_LEVEL_1G)):
                    more = (*pages, new) if ent == new else pages
                    grown.append((more, (*rows, (page, index, ent))))
        for pages, rows in grown:
            leaves = [(number,) for number in pages if number < 2000]
            for chosen in product((False, True), repeat=len(leaves)):
                yield Table((*rows, *compress(leaves, chosen), ()))


def random_tables() -> Iterator[Table]:
    """Yield 24 tables with what small ones lack, three of them big; always the same."""
    import random

    rng = random.Random(33)
    far = cycle(rng.sample(range(SPTE_ENT_PER_PAGE), SPTE_ENT_PER_PAGE))
    big = {6: (3, 40, 400, 16), 12: (2, 14, 500, 16), 18: (2, 512, 512, 999)}
    sizes: Any = (2, 3, 4, 5), (1, 3, 9), (9, 20, 40), (1, 2, 3, 4, 5, 16)
    for number in range(24):
        # The root's level, the numbers of leaves and SPTEs, and the size of the array.
        top, leaves, nr, size = big.get(number) or map(rng.choice, sizes)
        near = () if number in big else rng.choice(((), (0, 63, 64, 511)))
        roots = 1 if number in big else 2
        wide = [0, leaves, *[rng.randrange(1, 4) for _ in range(2, top)], roots]
        # Each page is linked; then many SPTEs point at the first page of a level.
        ents = [(1000 * k + n, k) for k in range(1, top) for n in range(wide[k])]
        while len(ents) < nr:
            k = rng.randrange(1, top)
            some = 1000 * k, 1000 * k, 1000 * k + wide[k] - 1, ABSENT
            ents += [(rng.choice((*some, LARGE if k < PG_LEVEL_1G else ABSENT)), k)]
        sptes = {}
        for ent, k in ents:
            page = 1000 * (k + 1) + rng.randrange(wide[k + 1])
            i = rng.choice(near or [next(far)])
            sptes[page, i] = (page, i, ent, 0)[: rng.choice((3, 4))]
        pages = [(1000 + n,) for n in range(leaves)]
        writes = [page for page in pages if number in big or rng.random() < 0.8]
        gone, new = (*rng.choice([*sptes]), ABSENT, 0), (2000, next(far), 1999, 0)
        later = () if number in big else (*writes, gone, new, (1999,), ())
        yield Table((*sptes.values(), *writes, (), *later), size)


def simpler(table: Table) -> Iterator[Table]:
    """Yield tables that lack something of `table`, those that lack much first."""
    script = table.script
    for size in [len(script) >> k for k in range(len(script).bit_length())]:
        for k in range(0, len(script), size):
            less = table._replace(script=script[:k] + script[k + size :])
            yield less
            yield less._replace(size=max(table.size - 1, 1))
    used = {row[:2] for row in script}
    for k, (page, i, *ent) in [(k, row) for k, row in enumerate(script) if row[2:]]:
        new = [(page, j, *ent) for j in (0, i // 2, i - 1)[:i] if (page, j) not in used]
        for row in [*new, (page, i, ent[0], 0)]:
            yield table._replace(script=(*script[:k], row, *script[k + 1 :]))
    for size in range(1, table.size):
        yield table._replace(size=size)


# ===================================================================== the check

# What is wrong has a name: "lost", a page stays unsync for good; "spin", there is no
# end; or, all "else": "findable", "counted" (between two walks), "marked" (at the end),
# "settled" (a caller's), "untouched", "returned", "gathered" (a walk's), an exception.
OUTCOMES = "fine", "else", "spin", "lost"


class Broken(BaseException):
    """There is no going on, and no walk should catch it."""


class Trial(Run):
    """A walk, judged as a caller runs it on a table, with an array of `table.size`.

    `outcome` is one of OUTCOMES, `why` a name and what is wrong, `end` the line of the
    trace after which it was so.
    """

    def __init__(
        self, table: Table, walk: Walk, array: Any, caller: Caller, told: bool = False
    ) -> None:
        super().__init__(walk, array(table.size), {}, [])
        self.table, self.caller = table, caller
        self.outcome, self.why, self.end = "fine", "", 0
        self.early = self.filled = False
        self.ticks = self.bound = 0.0
        self.numbered: Numbered = {}
        with suppress(Broken):
            try:
                self.numbered = table.build()
                self.built = [*self.numbered.values()]
                self.names = {sp: f"page {n}" for n, sp in self.numbered.items()}
                self.pages = self.built * told
                late = [*dropwhile(len, table.script)]
                self.again = [row for row in late if len(row) == 1]
                with self:
                    for row in late:
                        self.take(*row)
                self.mark_more()
            except (Exception, SystemExit) as error:  # noqa: BLE001
                self.expect(blame(error))

    def expect(self, broken: str) -> None:
        """Note what is broken, if anything is, and stop if there is no going on."""
        name = broken.split(":")[0]
        if broken and (self.outcome == "fine" or name in OUTCOMES):
            self.outcome = name if name in OUTCOMES else "else"
            before = f"{self.why}; then\n" if self.why else ""
            self.why, self.end = before + broken, len(self.lines)
        if name in ("lost", "spin", "gathered", "untouched"):
            raise Broken

    def take(self, *row: int) -> None:
        """Take a turn as the caller, or do what else a row of the script says."""
        if row and change(self.numbered, *row):
            self.see("set" if row[1:] else "write", self.numbered[row[0]], *row[1:2])
        for sp in self.built if not row else ():
            if sp.level > PG_LEVEL_4K and not sp.parent_ptes:
                self.call(sp)

    def call(self, root: kvm_mmu_page) -> None:
        """Let the caller deal with `root`; one that says -EINTR is called again."""
        self.states: list[object] = []
        self.batch: list[kvm_mmu_page] = []
        self.stored, marked = 0, root.unsync_children
        for calls in count(1):
            ret = self.caller(root, self.pvec, self)
            self.see("done", root, ret)
            if ret != -EINTR:
                break
            if calls > len(self.states) + 1:
                self.expect("spin: the caller returns -EINTR for ever")
        for sp in self.built:
            if sp.unsync and sp in below(root):
                self.expect(f"lost: {self.names[sp]} stays unsync for good")
        if marked and not self.states:
            self.expect("settled: the caller does not call the walk that it is given")
        if type(ret) is int and ret > self.stored:
            self.expect(f"settled: the caller counts {ret}, of {self.stored} stored")
        self.between()

    def between(self) -> None:
        """Expect what must hold whenever mmu_lock is free."""
        self.expect(findable(self.built, self.names))
        for sp in [sp for sp in self.built if sp.unsync_child_bitmap]:
            bits, said = f"{sp.unsync_child_bitmap:b}".count("1"), sp.unsync_children
            if said < bits:  # More are not wrong by themselves: 2.6.34 left them.
                self.expect(f"counted: {bits} bits, but unsync_children is {said}")

    def mark_more(self) -> None:
        """Expect that a new page is findable, too, though marking stops at set bits."""
        for sp in self.built:
            spt = list(sp.spt)
            if sp.level == PG_LEVEL_2M and None in spt:
                leaf = kvm_mmu_page(PG_LEVEL_4K)
                link_shadow_page(sp, spt.index(None), leaf)
                kvm_unsync_page(leaf)
                more = "marked: if one more page goes unsync,"
                self.expect(findable([leaf], self.names).replace("findable:", more))

    def __call__(self, root: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
        if left := sum(sp.unsync for sp in self.batch):
            self.expect(f"settled: {left} of the array's pages are left unsync")
        for row in self.again if len(self.states) == 1 else ():
            self.take(*row)
        self.between()
        known: dict[kvm_mmu_page, Row] = {}
        ways, steps = ways_from(root, known)
        old = [(sp, sp.unsync_child_bitmap, sp.unsync_children) for sp in self.built]
        rest = self.rest(pvec)
        self.states.append((old, rest))
        if self.states.count((old, rest)) > 2:
            self.expect("spin: walk after walk, and nothing changes")
        # Ample for each bit on each way, with a scan of all SPTEs at each page.
        self.bound = self.ticks + 500 + 20 * steps
        try:
            ret = super().__call__(root, pvec)
        finally:
            self.filled |= mmu_is_page_vec_full(pvec)
        if isinstance(ret, bool) or not isinstance(ret, int):
            raise TypeError(f"a walk must return an int, not {ret!r}")
        for sp, bits, nr in old:
            if sp.unsync_child_bitmap & ~bits or sp.unsync_children > nr:
                self.expect("untouched: the walk sets a bit, or counts up")
        if rest != self.rest(pvec):
            self.expect("untouched: the walk changes more than bits and array")
        for broken in self.broken(ret, ways, {*known}):
            self.expect(broken)
        self.batch = for_each_sp(pvec)
        self.stored += len(self.batch)
        return ret

    def rest(self, pvec: kvm_mmu_pages) -> list[object]:
        """Return all that a walk is to leave alone."""
        return [pvec.capacity] + [
            (sp.level, sp.gfn, sp.unsync, sp.parent_ptes.copy(), sp.spt.copy())
            for sp in self.built
        ]

    def broken(self, ret: int, ways: int, reached: set[Any]) -> Iterator[str]:
        """Yield what is wrong with what a walk has returned and gathered.

        That is -ENOSPC, with the array full; or how many, with all that is unsync in
        it: a page counts once, or once for each of the `ways` to it.
        """
        unsync = {sp for sp in reached if sp.unsync}
        pvec, leaves = self.pvec, for_each_sp(self.pvec)
        if ret == -ENOSPC and not mmu_is_page_vec_full(pvec):
            yield f"returned: -ENOSPC, with {pvec.nr} of {pvec.capacity} entries used"
        if ret >= 0 and not unsync.issubset(pvec.sp):
            yield f"returned: {ret}, but not all that is unsync is in the array"
        if ret != -ENOSPC and not len(unsync) <= ret <= ways:
            yield f"returned: {ret}, where -ENOSPC or {len(unsync)} to {ways} is right"
        if pvec.nr > pvec.capacity:
            yield f"gathered: {pvec.nr} pages in an array of {pvec.capacity}"
        if len(leaves) < pvec.nr and not self.gathers_parents:
            yield "gathered: pages above level 1; mark the walk by @gathers_parents"
        if not reached.issuperset(pvec.sp):
            yield "gathered: a page to which no set bits led"
        if not all(sp.unsync for sp in leaves):
            yield "gathered: a page that is in sync"
        if len({*leaves}) < len(leaves):
            yield "gathered: a page twice"

    def see(self, what: str, sp: Any, detail: Any = None) -> None:
        self.ticks += 0.04 if what == "read" else 1
        if self.walking and self.ticks > self.bound:
            self.expect(f"spin: the walk has not ended after {self.ticks:.0f} steps")
        super().see(what, sp, detail)
        if what == "overrun" and detail is self.pvec:
            self.expect("gathered: an add to a full array; KVM writes past its end")
        elif what == "clear" and self.walking:
            ent = list.__getitem__(sp.spt, detail)
            if isinstance(ent, kvm_mmu_page) and (ent.unsync_children or ent.unsync):
                self.early |= not (ent.unsync and ent in self.pvec.sp)


def ways_from(sp: kvm_mmu_page, known: dict[kvm_mmu_page, Row]) -> Row:
    """Return how many ways of set bits lead to unsync pages, and of how many bits."""
    if not sp.unsync_child_bitmap:
        known[sp] = (sp.unsync, 0)
    elif sp not in known:
        spt = list(sp.spt)
        ents = [spt[i] for i in for_each_set_bit(sp.unsync_child_bitmap)]
        behind = [ent for ent in ents if isinstance(ent, kvm_mmu_page)]
        found = [ways_from(child, known) for child in behind]
        known[sp] = tuple(map(sum, zip((sp.unsync, len(ents)), *found)))
    return known[sp]


class Verdict:
    """What the tables came to, with one walk, array and caller.

    `small` and `random` count them by outcome, `counts` both.  A small table counts by
    the worst that came of any size of the array, others have a size.  `smallest` has a
    table for each outcome; `case(outcome)` makes it smaller, and that is printed.
    `early`: on how many a bit was cleared before the page behind it was stored.  Under
    mmu_lock no other walk sees that, and it is no fault.
    """

    def __init__(self, walk: Walk, array: type[kvm_mmu_pages], caller: Caller) -> None:
        self.trial = partial(Trial, walk=walk, array=array, caller=caller)
        self.gathers_parents = getattr(walk, "gathers_parents", False)
        self.early = 0
        self.small, self.random = dict.fromkeys(OUTCOMES, 0), dict.fromkeys(OUTCOMES, 0)
        self.smallest: dict[str, Table] = {}

    @property
    def counts(self) -> dict[str, int]:
        return {what: self.small[what] + self.random[what] for what in OUTCOMES}

    def count(self, table: Table, alike: dict[int, Trial]) -> None:
        """Take in what comes of `table`.

        `alike` has trials, by size, whose array was never full: any array does as well.
        """
        tops = [row[0] // 1000 for row in table.script if row]
        least = max(tops, default=1) if self.gathers_parents else 1
        # In an array of more entries than the script has rows there is room for all.
        sizes = range(least, least + len(table.script) + 1)
        trials: list[Trial] = []
        for size in [max(least, table.size)] if table.size else sizes:
            trials += [alike.get(size) or self.trial(table._replace(size=size))]
            if not trials[-1].filled:
                alike[size] = trials[-1]
                break
        self.early += any(trial.early for trial in trials)
        worst = max(trials, key=lambda trial: OUTCOMES.index(trial.outcome))
        (self.random if table.size else self.small)[worst.outcome] += 1
        old = self.smallest.get(worst.outcome)
        if worst.outcome != "fine" and (not old or len(old.script) > len(table.script)):
            self.smallest[worst.outcome] = worst.table

    def case(self, outcome: str) -> Table:
        """Return `smallest[outcome]`, made smaller as long as the same is broken."""

        # The same sentence, whatever the numbers in it.
        def broken(table: Table) -> list[str]:
            return [*filter(str.isalpha, self.trial(table).why)]

        table, rows = self.smallest[outcome], 0
        same, smaller = broken(table), simpler(table)
        # A walk that remembers may not repeat it; and of large tables enough is enough.
        while same and rows < 100_000 and (less := next(smaller, None)):
            rows += len(less.script)
            if less != table and broken(less) == same:
                table, smaller = less, simpler(less)
        return table

    def told(self, outcome: str, most: int = sys.maxsize) -> str:
        """Return the case for `outcome`: what breaks, the table, and the steps to it.

        If these are more than `most` lines, those in the middle are left out.
        """
        trial = self.trial(self.case(outcome), told=True)
        forgot = f"{outcome}, but not again: something is remembered"
        why = trial.why if trial.outcome == outcome else forgot
        drawn = str(trial.table) if trial.numbered else repr(trial.table)
        head = f"{why}.  With an array of {trial.table.size}, at first:\n{drawn}"
        table = shortened(head.splitlines(), most // 2 + 1)
        steps = str(trial).splitlines()
        # They end where a page was lost, with that walk if there is room; or else where
        # the fault showed.
        lost = trial.lost if outcome == "lost" or why.startswith("findable") else {}
        end = min(lost.values(), default=trial.end)
        ends = [n for n, step in enumerate(steps, 1) if step.startswith("return")]
        after = min([n for n in ends if n > end], default=end)
        end = after if lost and len(table) + after <= most else end
        return "\n".join([*table, *shortened(steps[:end], most - len(table))])

    def __repr__(self) -> str:
        counts = ", ".join(f"{outcome} {n}" for outcome, n in self.counts.items())
        room = 24 // max(len(self.smallest), 1)
        worst = [outcome for outcome in OUTCOMES[::-1] if outcome in self.smallest]
        told = [self.told(outcome, room) for outcome in worst]
        return "\n".join([f"{sum(self.counts.values())} tables: {counts}", *told])


def shortened(text: list[str], most: int) -> list[str]:
    """Return the lines of `text`; of more than `most` (or 3) the first and the last."""
    cut, at = len(text) - max(most, 3) + 1, max(most, 3) // 2
    return [*text[:at], f"... {cut} lines ...", *text[at + cut :]] if cut > 1 else text


class Verdicts(dict[tuple[str, str, str], Verdict]):
    """By walk, array and caller.  Prints as a table of those not fine on all tables."""

    def __repr__(self) -> str:
        rows: list[Any] = [["", "", "", "small", *[""] * 3, "random", *[""] * 3]]
        rows += [["walk", "array", "caller", *OUTCOMES, *OUTCOMES]]
        for key, verdict in self.items():
            if verdict.smallest:
                rows.append([*key, *verdict.small.values(), *verdict.random.values()])
        fine, tables = len(self) + 2 - len(rows), sum(verdict.counts.values())
        told = [f"{fine} of {len(self)}: fine on all {tables} tables", columns(rows)]
        return "; the others:\n".join(told[: 1 + (len(rows) > 2)])


def check(
    sptes: int = 3,
    walks: dict[str, Walk] = WALKS,
    callers: dict[str, Caller] = CALLERS,
    arrays: Arrays = ARRAYS,
    tables: Iterable[Table] | None = None,
) -> Verdicts:
    """Judge `walks`, by label, on every table of up to `sptes` SPTEs, and random ones.

    Each runs with each of `callers` (an int that one returns is how many pages it has
    settled) and `arrays`.  `tables` may be given instead.  With an SPTE more there are
    some six times as many.
    """
    for given in walks, callers, arrays:
        meant = isinstance(given, dict) and given and not isinstance(sptes, dict)
        if not (meant and all(map(callable, given.values()))):
            wrong = f"check({sptes!r}, {given!r})"
            raise TypeError(f"call check(3, {{'mine': my_walk}}), not {wrong}")
    within("the number of SPTEs", sptes, 1, sys.maxsize)
    if tables is None:
        judged = [*small_tables(sptes), *random_tables()]
    else:
        judged = [*tables]
        for table in judged or [Table(())]:
            if not isinstance(table, Table) or () not in table.script:
                raise ValueError(f"give Tables with a caller's turn, (), not {table!r}")
            table.build()
    verdicts = Verdicts()
    for walk, array, caller in product(walks, arrays, callers):
        verdict = Verdict(walks[walk], arrays[array], callers[caller])
        verdicts[walk, array, caller] = verdict
    for table, walk, caller in product(judged, walks, callers):
        alike: dict[int, Trial] = {}
        for array, kind in arrays.items():
            shared = alike if kind in ARRAYS.values() else {}
            verdicts[walk, array, caller].count(table, shared)
    return verdicts


# ====================================================================== the answer


class Cost(NamedTuple):
    """Looks at a child, walks that return non-zero, and bits that the caller clears."""

    looks: int
    batches: int
    clears: int


def cost(
    root: kvm_mmu_page,
    walk: Walk,
    pvec: kvm_mmu_pages,
    caller: Caller = mmu_sync_children,
) -> Cost:
    """Count what it takes `caller` to deal with all that is below `root`."""
    run = Run(walk, pvec, {}, [])
    with run:
        caller(root, pvec, run)
    looks = sum(what == "look" and by_walk for what, by_walk, _ in run.steps)
    batches = sum(what == "return" and ret != 0 for what, _, ret in run.steps)
    clears = sum(what == "clear" and not by_walk for what, by_walk, _ in run.steps)
    return Cost(looks, batches, clears)


def order(walk: Walk) -> str:
    """Return in which order `walk` adds an unsync page and clears its bit."""
    root, run = kvm_mmu_page(2), Run(walk, kvm_mmu_pages(), {}, [])
    kvm_unsync_page(shadow_page_at(root, 0))
    with run:
        mmu_unsync_walk(root, run.pvec, run)
    done = [what for what, by_walk, _ in run.steps if by_walk and what != "look"]
    return ", ".join(done) if "clear" in done else "bits stay"


# The level of the root, and the addresses whose level-1 pages are unsync.
COSTED: dict[str, tuple[int, list[int]]] = {
    "sparse": (4, [i << 30 for i in range(24)]),
    "32 x 32": (4, [i << 30 | j << 21 for i in range(32) for j in range(32)]),
    "16 shared": (3, [i << 21 for i in range(16)]),
}


def costs(
    name: str, variants: dict[str, tuple[Walk, Caller]] = VARIANTS
) -> dict[str, Cost]:
    """Return by variant what a sync of table `name` of COSTED costs."""
    level, addresses = COSTED[name]
    root, found = kvm_mmu_page(level), {}
    leaves = [shadow_page_at(root, gva) for gva in addresses]
    if name == "16 shared":
        link_shadow_page(root, 1, kvm_mmu_page(2))
        for i, sp in enumerate(leaves):
            link_shadow_page(root.spt[1], i, sp)
    for label, (walk, caller) in variants.items():
        for sp in leaves:
            kvm_unsync_page(sp)
        found[label] = cost(root, walk, kvm_mmu_pages(), caller)
    return found


def answer_table(sptes: int = 2) -> str:
    """Return the table that answers the thread; `sptes` bounds the tables it counts."""
    tables, price = [*small_tables(sptes)], costs("32 x 32")
    unsync = sum(1 in map(len, table.script) for table in tables)
    rows: list[list[object]] = [
        ["", "", "stores", "lost if", "with", "", "", "", ""],
        ["", "order", "parents", "refused", "KVM's", "early", *Cost._fields],
    ]
    for label, (walk, caller) in VARIANTS.items():
        found = check(sptes, {label: walk}, {"": caller}, tables=tables)
        kvm, refusing = found[label, "KVM's", ""], found[label, "refusing", ""]
        parents = "yes" if getattr(walk, "gathers_parents", False) else "no"
        lost = refusing.counts["lost"], kvm.counts["lost"], kvm.early
        rows.append([label, order(walk), parents, *lost, *price[label]])
    return f"""\
Of {len(tables)} tables of at most {sptes} SPTEs, {unsync} have unsync pages.  On how many is a page
lost, if a full array refuses adds; and with KVM's array, whatever its size?
early: on how many is a bit cleared before the page behind it is stored?  (Under
mmu_lock no other walk sees it.)  Looks at children, batches (walks that return
non-zero) and clears by the caller: to sync 32 x 32 pages, 32 below each of 32.
before: 04/12 alone; posted: 05/12; series-end: 12/12; suggested: the review's.
{columns(rows)}"""


# ====================================================================== the demo

# The case that the review asks about: a root with two unsync pages.
REVIEWED = Table(((2000, 0, 1000), (2000, 1, 1001), (1000,), (1001,), ()), size=2)


def process() -> tuple[kvm_mmu_page, Names]:
    """Return the root of a small process, and names for its level-1 pages."""
    root = kvm_mmu_page(4)
    at = enumerate(("text", "data", "heap"), 2)
    names = {shadow_page_at(root, i << 21): name for i, name in at}
    for sp in [*names][1:]:
        kvm_unsync_page(sp)
    return root, names


def demo() -> str:
    """Return what `python unsync_walk.py` prints."""
    root, names = process()
    tree, pvec = draw(root, names), kvm_mmu_pages()
    steps = narrate(root, pvec, names)
    refusing, kvm = (
        Trial(REVIEWED, walk_posted, array, mmu_sync_children, told=True)
        for array in (RefusingPages, kvm_mmu_pages)
    )
    refused, lines = str(refusing).rpartition("\ndone")[0], str(kvm).splitlines()
    first = "\n".join(lines[: lines.index("return -ENOSPC") + 1])
    synced = ", then ".join(line[7:] for line in lines if line.startswith("sync"))
    return f"""\
A guest has written the page tables of its data and heap, and flushes its TLB.
[i] is SPTE i of a shadow page; [i*] has its bit set: behind it there may be an
unsync page.  The review's walk, __mmu_unsync_walk() here, follows these bits:
{tree}
{steps}
The caller must sync or zap all in the array: {", ".join(names[sp] for sp in pvec.sp)}.

The review (YtcLiNskPb8z/2Qc@google.com) asks of 05/12, which clears a bit and
then adds the page: what if the add fails?  Take root 2000, unsync pages 1000
and 1001, an array of 2, and parents stored as well.  If a full array refused:
{refused}
But KVM's array stores a page, and then says if it is full.  So the walk ends:
{first}
In {sum(line[:4] == "walk" for line in lines)} walks the caller syncs {synced}.

{answer_table()}
So with KVM's array 05/12 loses {kvm.why or "nothing"}: an add stores, and then says "full"."""


def judge(where: str, arrays: Arrays) -> tuple[int, str]:
    """Judge the walk at FILE:NAME; return the exit status, and what there is to say."""
    import runpy

    path, _, name = where.rpartition(":")
    sys.modules.setdefault("unsync_walk", sys.modules[__name__])
    try:
        # Another copy of this file would have pages and watchers of its own.
        own = os.path.samefile(path or where, __file__)
        space = globals() if own else runpy.run_path(path or where, run_name="judged")
        walk = space[name]
        if not callable(walk):
            raise TypeError(f"{walk!r} is no function")
    except (Exception, SystemExit) as error:  # noqa: BLE001
        said = f"{type(error).__name__}: {error}"
        return 2, f"no walk at {where!r} (give FILE:NAME): {said}"
    callers = {label: CALLERS[label] for label in CALLERS if label != "careless"}
    found = check(3, {name: walk}, callers, arrays)
    for key, verdict in found.items():
        if verdict.smallest:
            return 1, f"{found}\n\n{', '.join(key)}: {verdict}"
    return 0, str(found)


def main(*argv: str) -> int:
    """Print the demo, or what the arguments ask for; return the exit status."""
    if not argv:
        print(demo())
        return 0
    # Slow to import, and without an argument there is nothing to parse.
    import argparse

    parser = argparse.ArgumentParser(
        description="Show KVM's unsync walk, and what answers its patch thread.",
        usage="unsync_walk.py [--walk NAME | --check N | --judge FILE:NAME] [--array A]",
    )
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--walk", choices=[*VARIANTS], help="tell its steps, as in: --walk posted")
    about = "judge the thread's walks, on all tables of up to 3 SPTEs (or --check 4: "
    about += "each more takes some six times as long), and on random ones"
    add("--check", nargs="?", type=int, const=3, choices=range(1, 7), help=about)
    add("--judge", metavar="FILE:NAME", help="judge your walk: --judge mine.py:walk")
    about = "with KVM's array alone, or one that refuses adds when it is full"
    parser.add_argument("--array", choices=["kvm", "refusing"], help=about)
    given = parser.parse_args(argv)
    arrays = {k: ARRAYS[k] for k in ARRAYS if k.lower().startswith(given.array or "")}
    status = 0
    if given.judge is not None:
        status, text = judge(given.judge, arrays)
    elif given.check:
        text = f"{check(given.check, arrays=arrays)}\n(careless breaks the contract)"
    else:
        (root, names), (walk, caller) = process(), VARIANTS[given.walk]
        text = draw(root, names) + "\n"
        text += narrate(root, kvm_mmu_pages(), names, walk, caller) + f"\n\n{REVIEWED}"
        # Room for one of the two, beside the root if it is stored.
        case = REVIEWED._replace(size=1 + getattr(walk, "gathers_parents", False))
        for name, array in arrays.items():
            trial = Trial(case, walk, array, caller, told=True)
            why = trial.why or "all in sync"
            text += f"\nAn array of {case.size}, {name}:\n{trial}\n{why}"
    print(text, file=sys.stderr if status == 2 else sys.stdout)
    return status


# ===================================================================== the tests

README = os.path.join(os.path.dirname(os.path.abspath(__file__)), "README.md")


def load_tests(loader: object, tests: object, pattern: object) -> object:
    """Collect the tests below, and the examples of this file and of README.md."""
    import doctest
    import unittest

    if sys.flags.optimize:
        raise SystemExit("Test without -O: it leaves out the asserts.")
    # By its path this may have another name, but README imports it by this.
    sys.modules.setdefault("unsync_walk", sys.modules[__name__])
    suite = unittest.TestSuite([doctest.DocTestSuite(__name__)])
    names = [name for name in globals() if name.startswith("test_")]
    if os.path.exists(README):
        suite.addTest(doctest.DocFileSuite(README, module_relative=False))
    else:
        names = [name for name in names if "readme" not in name]
    suite.addTests(unittest.FunctionTestCase(globals()[name]) for name in names)
    return suite


def test_refusals() -> None:
    """Misuse raises, and changes nothing."""
    import unittest

    leaf, middle, root, five = pages = [*map(kvm_mmu_page, (1, 2, 4, 5))]
    link_shadow_page(middle, 7, leaf)
    set_large_spte(middle, 8)
    pvec, short, gap = kvm_mmu_pages(1), kvm_mmu_pages(), kvm_mmu_pages()
    mmu_pages_add(pvec, leaf)
    short.sp, short.idx = [middle, leaf], [-1]
    gap.sp, gap.idx = [root, leaf], [-1, 7]
    odd, edge, w = kvm_mmu_page(2), 1 << 47, walk_posted
    odd.unsync_child_bitmap, odd.unsync = 1 << 7, True
    page, at, link = kvm_mmu_page, shadow_page_at, link_shadow_page
    large, sync, clear = set_large_spte, kvm_sync_page, clear_unsync_child_bit
    before = [*map(draw, pages)], str(pvec), pvec.idx == [INVALID_INDEX]
    wrong = [Table(((2000, 0, 1000),))], [Table(((2000, 0, 3000), ()))]
    refusals: dict[type[Exception], list[Any]] = {
        ValueError: [
            (page, 0), (page, 6), (page, 1, -1), (page, 1, 1 << 52), (kvm_mmu_pages, 0),
            (kvm_unsync_page, middle), (mark_unsync, leaf, 0), (at, middle, -1),
            (at, middle, 1 << 30), (at, middle, 8 << 21), (at, root, edge), (at, root, -1),
            (at, root, (1 << 64) - edge - 1), (at, root, 1 << 64), (at, five, 1 << 56),
            (at, five, 1 << 64), (link, root, 0, middle), (link, leaf, 0, leaf),
            (link, middle, 7, page(1)), (large, leaf, 7), (large, root, 7), (sync, leaf),
            (sync, middle), (sync, odd), (clear, middle, 7), (clear, odd, 7), (check, 0),
            (mmu_unsync_walk, middle, pvec, w), (narrate, middle, pvec, None, w),
            (for_each_sp_path, short), (for_each_sp_path, gap),
            *[(check, 1, WALKS, CALLERS, ARRAYS, given) for given in ([], REVIEWED, *wrong)],
        ],
        IndexError: [(link, middle, -1, leaf), (mark_unsync, middle, 512),
                     (clear, middle, 512), (middle.spt.__getitem__, -1)],
        OverflowError: [(mmu_pages_add, pvec, middle)],
        TypeError: [
            (page, 1.5), (at, root, 0.5), (mark_unsync, middle, 0.5), (check, "4"),
            (check, 3, {}), (check, 3, w), (check, 3, {"w": "posted"}), (check, {"w": w}),
            (check, 2, WALKS, {}), (check, 2, WALKS, CALLERS, {}),
            (mmu_unsync_walk, root, pvec, "posted"), (narrate, root, pvec, w),
        ],
        AttributeError: [(setattr, leaf, "unsynced", True)],
    }  # fmt: skip
    for error, calls in refusals.items():
        for call in calls:
            unittest.TestCase().assertRaises(error, *call)
    assert before == ([*map(draw, pages)], str(pvec), True)


def test_history() -> None:
    """Whatever is done, pages stay findable, counts true, links known at both ends; and
    a page with unsync children has its bit in each parent, as marking relies on.
    """
    import random

    rng = random.Random(12)
    pages = [kvm_mmu_page(level) for level in (1, 1, 1, 1, 2, 2, 2, 3, 3, 4)]
    settle = mmu_sync_children, mmu_zap_unsync_children, kvm_mmu_prepare_zap_page
    calls: list[tuple[Any, int]] = [(call, 1) for call in (*settle, kvm_unsync_page)]
    calls += [(set_large_spte, 2), (mmu_page_zap_pte, 2), *[(link_shadow_page, 3)] * 2]
    for _ in range(400):
        (call, nr), sp, other = rng.choice(calls), rng.choice(pages), rng.choice(pages)
        behind = below(sp)[1:]
        unsync = sum(page.unsync for page in behind)
        try:
            ret = call(*(sp, rng.choice((0, 63, 511)), other)[:nr])
        except ValueError:
            continue
        ways = [(page, *way) for page in pages for way in page.parent_ptes]
        assert all(parent.spt[i] is page for page, parent, i in ways)
        assert len(ways) == sum(
            isinstance(ent, kvm_mmu_page) for sp in pages for ent in sp.spt
        )
        assert not findable(pages, {})
        for page, parent, i in ways:
            assert parent.unsync_child_bitmap >> i & 1 or not page.unsync_children
        for page in pages:
            bits = [*for_each_set_bit(page.unsync_child_bitmap)]
            assert len(bits) == page.unsync_children
        if call in settle:
            assert not sp.unsync_children and not any(page.unsync for page in behind)
            assert ret == (None if call is kvm_mmu_prepare_zap_page else unsync)
        if call is kvm_mmu_prepare_zap_page:
            assert not (sp.unsync or sp.parent_ptes or any(sp.spt))


def test_bounds() -> None:
    """What is just in bounds is accepted; a shared page is stored once."""
    for level, end in (1, 1 << 21), (3, 1), (3, 1 << 39), (4, 1 << 47), (5, 1 << 56):
        assert shadow_page_at(kvm_mmu_page(level, (1 << 52) - 1), end - 1).level == 1
    high = kvm_mmu_page(4)
    assert shadow_page_at(high, (1 << 64) - (1 << 47)) in below(high)
    stack = shadow_page_at(high, 0x7FFF_FFFF_E000).parent_ptes
    assert str(high) == "kvm_mmu_page(4, 0x0)"
    assert repr(stack) == "[(kvm_mmu_page(2, 0x7fffc0000), 511)]"
    root, leaf, pvec = kvm_mmu_page(2), kvm_mmu_page(1, gfn=9), kvm_mmu_pages(5)
    for i, sp in enumerate((leaf, kvm_mmu_page(1), leaf)):
        link_shadow_page(root, i, sp)
        kvm_unsync_page(sp)
    told = narrate(root, pvec, caller=mmu_zap_unsync_children)
    assert "  add    level 1, label 0x9: there already\n" in told
    assert "return 3\nzap    level 1, label 0x9\nzap " in told and told.endswith("done")
    assert mmu_unsync_walk(REVIEWED.build()[2000], pvec) == 2 == pvec.nr


def judged(walk: Any, caller: Any = mmu_sync_children, tables: Any = ()) -> Verdict:
    """Return the verdict on `walk` and `caller` with KVM's array."""
    array, tables = {"": kvm_mmu_pages}, tables or [REVIEWED._replace(size=0)]
    return check(1, {"": walk}, {"": caller}, array, tables)["", "", ""]


def test_power() -> None:
    """Each statement of the reference counts, save a clear: without, it is slow."""
    import ast
    import inspect

    tree: Any = ast.parse(inspect.getsource(__mmu_unsync_walk))
    edits: list[Any] = []
    for node in ast.walk(tree.body[0]):
        if isinstance(node, ast.If):
            edits += [(vars(node), "test", ast.UnaryOp(ast.Not(), node.test))]
        for body in vars(node).get("body", ()), vars(node).get("orelse", ()):
            edits += [(body, k, ast.Pass()) for k in range(len(body))]
    passed, tables = [], [*random_tables()][:6]
    for place, key, new in edits:
        old, place[key] = place[key], new
        space = {**globals()}
        exec(compile(ast.fix_missing_locations(tree), "", "exec"), space)  # noqa: S102
        if not judged(space["__mmu_unsync_walk"], tables=tables).smallest:
            passed += [ast.unparse(old)]
        place[key] = old
    assert passed[1:] == ["clear_unsync_child_bit(sp, i)"]  # [0] is the docstring


def after(deed: Any) -> Walk:
    """Return a walk that does `deed` after the review's walk."""

    def walk(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> Any:
        ret = WALKS["suggested"](sp, pvec)
        return deed(sp, pvec, ret) or ret

    return walk


def endless(sp: kvm_mmu_page, pvec: kvm_mmu_pages, ret: int) -> None:
    while sp.spt[9] is None:
        pass


def overrun(sp: kvm_mmu_page, pvec: kvm_mmu_pages, ret: int) -> None:
    with suppress(OverflowError):
        _ = [pvec.store(sp.spt[0]) for _ in range(pvec.capacity + 1)]


def test_walk_faults() -> None:
    """What a walk must not do is named, and the steps to it are told."""
    from operator import setitem

    forgetful = iter([True])
    deeds: list[tuple[str, Any]] = [
        ("untouched: the walk sets", lambda sp, a, ret: mark_unsync(sp, 9)),
        ("untouched: the walk sets", lambda sp, a, ret: setattr(sp, "unsync_children", 9)),
        ("untouched: the walk changes", lambda sp, a, ret: setattr(sp, "gfn", 9)),
        ("untouched: the walk changes", lambda sp, a, ret: setattr(a, "capacity", 99)),
        ("untouched: the walk changes", lambda sp, a, ret: setitem(sp.spt, 9, sp)),
        ("lost: page 1001 stays", lambda sp, a, ret: setattr(sp, "unsync_children", 0)),
        ("gathered: 3 pages", lambda sp, a, ret: a.sp.extend([*a.sp] * 2)),
        ("gathered: pages above", lambda sp, a, ret: setitem(a.sp, 0, sp)),
        ("gathered: a page to", lambda sp, a, ret: setitem(a.sp, 0, kvm_mmu_page(1))),
        ("gathered: a page twice", lambda sp, a, ret: a.sp.extend(a.sp[:ret > 1])),
        ("gathered: a page that", lambda sp, a, ret: ret and setitem(a.sp, 0, sp.spt[0])),
        ("gathered: an add", overrun),
        ("spin: the walk has not ended after 5", endless),
        ("spin: the walk", lambda *_: [*iter(lambda: [*for_each_set_bit(1)], [])]),
        ("TypeError: a walk must return an int, not True", lambda sp, a, ret: True),
        ("TypeError: a walk must return an int, not 0.5", lambda sp, a, ret: 0.5),
        ("returned: -ENOSPC, with 0", lambda sp, a, ret: -ENOSPC),
        ("returned: 1, but not all", lambda sp, a, ret: int(ret < 0)),
        ("returned: 3, where -ENOSPC or 1 to 1", lambda sp, a, ret: (ret > 0) * 3),
        ("else, but not again", lambda sp, a, ret: next(forgetful, False) and a.sp.clear()),
        ("AttributeError: 'kvm_mmu_page' object", lambda sp, a, ret: sp.nothing),
    ]  # fmt: skip
    for name, deed in deeds:
        assert f"\n{name}" in str(judged(after(deed))), name
    root, pvec = REVIEWED.build()[2000], kvm_mmu_pages()
    told = narrate(root, pvec, walk=after(deeds[-1][1])).splitlines()
    assert told[-1].startswith("raise  AttributeError: 'kvm_mmu_page'")
    assert narrate(root, pvec, walk=after(overrun)) == "return 0"


def test_cases() -> None:
    """What is wrong on random tables alone is shown by as little as shows it."""
    seen: dict[Any, Any] = {}

    def without(skip: Any) -> Walk:
        def walk(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
            for i in for_each_set_bit(sp.unsync_child_bitmap):
                if skip(sp, i, sp.spt[i]):
                    clear_unsync_child_bit(sp, i)
            return WALKS["suggested"](sp, pvec)

        return walk

    cases: list[Any] = [
        (lambda sp, i, ent: i > 99, [4, 1, 0], 100),
        (
            lambda sp, i, ent: len(getattr(ent, "parent_ptes", ())) > 2,
            [4, 4, 4, 1, 0],
            2,
        ),
        (lambda sp, i, ent: seen.setdefault(sp, [*sp.spt])[i] != ent, [4, 1, 0] * 2, 1),
    ]
    for skip, kinds, highest in cases:
        verdict = judged(without(skip), tables=[*random_tables()][2::3])
        script = verdict.case("lost").script
        assert [*map(len, script)] == kinds
        assert max(row[1] for row in script if row[1:]) <= highest
    told = "set    [1] of page 2000: level 1, page 1999, in sync\nwrite  page 1999\n"
    assert told in verdict.told("lost")
    gfns = [sp.gfn for sp in Table(((1002,), (1001,), (1000,))).build().values()]
    assert gfns == [1 << 33 | 1, 0, 0]
    empty = without(lambda sp, i, ent: getattr(ent, "spt", 0) and not any(ent.spt))
    told = "marked: if one more page goes unsync, [0] of page 3000 is clear, with"
    assert f"\n{told}" in str(judged(empty, tables=small_tables(2)))


def test_caller_faults() -> None:
    """What a caller or marking must not do is named; Linux's, or to yield, is right."""
    from unittest import mock

    class DroppingPages(kvm_mmu_pages):
        def store(self, sp: kvm_mmu_page, idx: int = INVALID_INDEX) -> bool:
            return self.capacity < 2 and super().store(sp, idx)

    def late(root: kvm_mmu_page, pvec: kvm_mmu_pages, walk: Walk) -> None:
        _ = walk(root, pvec), walk(root, pvec)
        for sp in below(root):
            sp.unsync = False

    def yields(root: kvm_mmu_page, pvec: kvm_mmu_pages, walk: Walk) -> int:
        ret = mmu_unsync_walk(root, pvec, walk)
        for sp in for_each_sp(pvec):
            kvm_sync_page(sp)
        return -EINTR if ret else 0

    callers: list[tuple[str, Any]] = [
        ("settled: the caller does not", lambda root, *_: mmu_sync_children(root)),
        ("settled: 1 of", late),
        ("settled: the caller counts", lambda *run: mmu_sync_children(*run) + 1),
        ("spin: the caller", lambda *run: -EINTR),
    ]
    for name, caller in callers:
        assert f"\n{name}" in str(judged(walk_series_end, caller)), name
    assert "done   -EINTR" in str(judged(walk_series_end, callers[-1][1]))
    bits = {"mark_unsync": lambda sp, i: setattr(sp, "unsync_child_bitmap", 1 << i)}
    with mock.patch.dict(globals(), bits):
        told = judged(walk_series_end, tables=small_tables(1)).told("else")
        assert "counted: 1 bits, but unsync_children is 0" in told
    one = [Table(((2000, 0, 1000), (1000,), ()))]
    both = {"KVM's": kvm_mmu_pages, "dropping": DroppingPages}
    found = check(1, WALKS, {"sync": mmu_sync_children}, both, one)
    assert found["suggested", "dropping", "sync"].counts["lost"] == 1
    right = {"yields": yields, **LINUX_CALLERS}
    tables, array = [*small_tables(2), *[*random_tables()][::3]], {"": kvm_mmu_pages}
    found = check(1, {"linux": walk_before}, right, array, tables)
    assert str(found) == "3 of 3: fine on all 57 tables"


def test_signal() -> None:
    """What a signal's handler raises is not the walk's, and passes."""
    import signal
    import unittest

    def handler(*given: object) -> None:
        raise TimeoutError

    def walk(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> Any:
        signal.raise_signal(signal.SIGINT)

    old = signal.signal(signal.SIGINT, handler)
    raises = unittest.TestCase().assertRaises
    raises(TimeoutError, judged, walk)
    raises(TimeoutError, narrate, REVIEWED.build()[2000], kvm_mmu_pages(), walk=walk)
    signal.signal(signal.SIGINT, old)


def test_costs() -> None:
    """Looks, batches and clears are those of the C; the order costs a look an array."""
    known = {
        "sparse": "52 4 49, 105 5 0, 55 4 0, 55 4 0, 51 2 0, 52 2 0",
        "32 x 32": "1200 80 1057, 2275 84 0, 1217 80 0, 1279 80 0, 1185 64 0, 1249 64 0",
        "16 shared": "38 2 17, 55 2 0, 35 2 0, 36 2 0, 35 1 0, 36 1 0",
    }
    for name, prices in known.items():
        found, full = costs(name), len(COSTED[name][1]) // KVM_PAGE_ARRAY_NR
        told = [" ".join(map(str, price)) for price in found.values()]
        assert ", ".join(told) == prices
        assert found["suggested"].looks - found["series-end"].looks == full


def test_savings() -> None:
    """Each set bit is cleared once; 05/12 saves looks on shared pages, not on trees."""
    saved_on = set()
    for table in [table for table in small_tables(3) if 1 in map(len, table.script)]:
        sptes = [row[2] for row in table.script if row[2:]]
        linked = [ent for ent in sptes if ent >= 1000]
        looks = {}
        for label, (walk, caller) in VARIANTS.items():
            trial = Trial(table._replace(size=16), walk, kvm_mmu_pages, caller)
            steps = [what for what, *_ in trial.steps]
            assert steps.count("clear") == len(sptes)
            looks[label] = steps.count("look")
        if looks["posted"] < looks["linux"]:
            saved_on.add("shared" if len({*linked}) < len(linked) else "tree")
    assert saved_on == {"shared"}


def shell(*argv: str) -> tuple[object, str]:
    """Return the exit status for arguments `argv`, and what is printed."""
    import io
    from contextlib import redirect_stderr, redirect_stdout

    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        try:
            return main(*argv), out.getvalue()
        except SystemExit as error:
            return error.code, out.getvalue()


def test_shell() -> None:
    """The demo fits into a mail; a walk is told, with what is lost."""
    status, told = shell()
    lines = told.splitlines()
    assert status == 0 and len(lines) <= 60 and max(map(len, lines)) <= 80
    assert told.isascii() and told.count("<-- page 1001 is lost") == 1
    status, told = shell("--walk", "posted", "--array", "refusing")
    assert status == 0 and told.count("<-- page 1001 is lost") == 1 and "text" in told
    assert told.endswith("\ndone\nlost: page 1001 stays unsync for good\n")
    assert "page 1001 is lost" in shell("--walk", "series-end")[1]
    assert shell("--check", "0")[0] == 2 == shell("--walk", "x")[0]


def readme(section: str = "") -> str:
    """Return the text of README, or of the first example after ```section."""
    with open(README) as file:
        text = file.read()
    return text.split(f"```{section}\n")[1].split("```")[0] if section else text


def test_readme_judge() -> None:
    """What README says of a walk of one's own: status 0 if it is fine, 1 if it is not,
    with its slip, or where it raises; 2 if there is none.
    """
    import pathlib
    import runpy
    import tempfile
    from unittest import mock

    own, clear = readme("python"), "        clear_unsync_child_bit(sp, i)\n"
    slip = own.replace(clear, "").replace(
        "        ent, full", f"{clear}        ent, full"
    )
    small = mock.patch.dict(globals(), {"random_tables": list})
    with small, tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "mine.py")
        for name, source, array, status, said in (
            ("walk", own, "kvm", 0, "3 of 3: fine on all 266 tables"),
            ("walk", slip, "kvm", 1, readme("text")),
            ("nothing", own, "kvm", 2, "nothing"),
            ("PAGE_SHIFT", own, "kvm", 2, "PAGE_SHIFT"),
            (file, own, "kvm", 2, "give FILE:NAME"),
        ):
            file.write_text(source)
            code, told = shell("--judge", f"{file}:{name}", "--array", array)
            assert code == status and said in told, told
            assert status < 2 or told.count("\n") == 1
        assert shell("--judge", f"{__file__}:walk_posted", "--array", "kvm")[0] == 0
        told = f"{check(1)}\n(careless breaks the contract)\n"
        assert shell("--check", "1") == (0, told)
        walk = runpy.run_path(str(file))["walk"]
        refusing: Arrays = {"": RefusingPages}
        found = check(2, {"": walk}, {"": mmu_sync_children}, refusing)["", "", ""]
        assert found.counts["lost"] == 1
        assert costs("32 x 32", {"": (walk, mmu_sync_children)})[""].looks == 1185
        file.write_text(own.replace("sp.spt", "sp.no"))
        walk = runpy.run_path(str(file))["walk"]
        assert "(line 6: ent, full = sp.no[i], False)" in str(judged(walk))


def test_readme() -> None:
    """What README claims of shared pages, and of verdicts."""
    import zlib

    words = " ".join(readme().split())
    links = (3000, 0, 2000), (3000, 1, 2001), (2000, 0, 1000), (2001, 0, 1000)
    looks = []
    for walk, caller in VARIANTS["linux"], VARIANTS["posted"]:
        root = Table((*links, (1000,))).build()[3000]
        looks.append(cost(root, walk, kvm_mmu_pages(), caller).looks)
    price, shared = costs("32 x 32"), costs("16 shared")
    end, posted, linux = price["series-end"], price["posted"], price["linux"]
    verdicts = check()
    careless = verdicts["suggested", "KVM's", "careless"].small
    unsync = verdicts["posted", "KVM's", "careless"].small["lost"]
    assert unsync == sum(1 in map(len, table.script) for table in small_tables(3))
    for claim in (
        f"`linux` {looks[0]} looks, `posted` {looks[1]};",
        f"16 leaves: {shared['linux'].looks}, {shared['posted'].looks}.",
        f"{end.looks} looks and {price['suggested'].looks} in {end.batches} batches",
        f"({posted.looks - linux.looks} more in 32 x 32)",
        f"without the extra look ({end.looks} on 32 x 32)",
        f"on {careless['lost']}, and spins on {careless['spin']}",
        f"each of {unsync} small tables",
    ):
        assert claim in words, claim
    kept = {key: verdict for key, verdict in verdicts.items() if key[2] != "careless"}
    wrong = {key[:2] for key, verdict in kept.items() if verdict.smallest}
    assert wrong == {("posted", "refusing"), ("series-end", "refusing")}
    assert not any(v.early for key, v in verdicts.items() if key[0] == "suggested")
    assert str(verdicts).startswith("24 of 40: fine on all 290 tables; the others:\n")
    # The same on every Python, and in every run.
    told = [[*random_tables()], verdicts, *verdicts.values()]
    assert zlib.crc32("\n".join(map(str, told)).encode()) == 1204732248
    verdict = verdicts["posted", "refusing", "sync"]
    assert "findable: [1] of page 2000 is clear, with" in verdict.told("else")
    assert len(str(verdict).splitlines()) <= 25


# `import *` is to bring the walk too, whose name begins with underscores.
__all__ = [name for name in globals() if name[0] != "_" or name == "__mmu_unsync_walk"]

if __name__ == "__main__":
    try:
        status = main(*sys.argv[1:])
        if sys.stdout is None:
            raise OSError("standard output is closed")
        sys.stdout.flush()
    except OSError as error:
        # A pipe's reader, as `| head`, has seen enough; flush nothing more at exit.
        status = not isinstance(error, BrokenPipeError)
        print(f"unsync_walk.py: {error}\n" * status, end="", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)
