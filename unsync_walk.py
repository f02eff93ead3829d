# SPDX-License-Identifier: GPL-2.0-only
r"""KVM's unsync walk as a model that runs: one file, to be read beside its thread.

__mmu_unsync_walk() here is the walk that the review suggests, and there it is called
__mmu_unsync_walk_and_clear().  Linux's own, which it still has, is walk_before() here.
All else that KVM has (arch/x86/kvm/mmu/) keeps its name; its callers are as of 04/12.

KVM has a *shadow page* for each page table of a guest.  Where it maps one of level 1
writable, the guest may change that unseen: its shadow page is *unsync*.  On a TLB flush
KVM must find all such pages below a root, to sync or zap them; miss one, and a stale
translation stays in use.  A bit for each entry (SPTE) of a page shows the way:

             level 3    unsync_child_bitmap {0, 7}
             /        \
        [0] /          \ [7]
         level 2 {4}    level 2 {4, 5}      shadow pages form a DAG:
             \          /    \              the left level-1 page has two
          [4] \    [4] /      \ [5]         parents, its bit is set in both
               level 1        level 1, both unsync

* A set bit promises little: an unsync page *may* be behind it; if not, it is *stale*.
* A clear bit promises that none is, except what a walk has put in its array already.
* Hence the contract: before it drops mmu_lock, the caller must sync or zap *all* pages
  in the array, also when the walk returned -ENOSPC because the array is full.

05/12, a patch of 2022, clears a bit, then adds the page behind it to the array.  Its
review (YtcLiNskPb8z/2Qc@google.com) asks: what if the add fails?  KVM's does not.  But
in *any* order such a walk can mislead a reader without the lock: see is_unsync_root().

Misuse changes nothing and raises IndexError (an SPTE outside 0..511), OverflowError
(KVM would write past its array), ValueError; TypeError, AttributeError (no such thing).
"""

from __future__ import annotations

import pathlib
import re
import signal
import sys
import unittest
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from contextlib import suppress
from errno import ENOSPC
from itertools import compress, product
from operator import index as as_int
from random import Random
from typing import Any, Optional

PG_LEVEL_4K, PG_LEVEL_2M, PG_LEVEL_1G, PT64_ROOT_MAX_LEVEL = 1, 2, 3, 5
SPTE_LEVEL_BITS, SPTE_ENT_PER_PAGE, PAGE_SHIFT = 9, 512, 12
KVM_PAGE_ARRAY_NR, INVALID_INDEX = 16, -1

Pvec = Optional["kvm_mmu_pages"]
Walk = Callable[["kvm_mmu_page", "kvm_mmu_pages"], int]

# -------------------------------------------------- shadow pages, and their bits

LARGE_SPTE = "large SPTE"  # else an SPTE is None, or the page that it points at


class kvm_mmu_page:
    """A shadow page of `level` 1 (without `spt`) to 5, labelled by `gfn` and `name`."""

    def __init__(self, level: int, gfn: int = 0, *, name: str = "") -> None:
        self.level = check_range("a level", level, PG_LEVEL_4K, PT64_ROOT_MAX_LEVEL)
        self.gfn = check_range("a gfn", gfn, 0, (1 << 52) - 1)
        self.name = name
        self.spt: list[Any] = [None] * SPTE_ENT_PER_PAGE if level > PG_LEVEL_4K else []
        self.parent_ptes: list[tuple[kvm_mmu_page, int]] = []
        self.unsync, self.unsync_children, self.unsync_child_bitmap = False, 0, 0

    def __str__(self) -> str:
        return self.name or f"level {self.level}, gfn {self.gfn:#x}"

    def __repr__(self) -> str:
        state = "unsync" if self.unsync else "in sync"
        state = f"unsync_children {self.unsync_children}" if self.spt else state
        return f"level {self.level}, {self.name or f'gfn {self.gfn:#x}'}, {state}"


def is_shadow_present_pte(ent: object) -> bool:
    """Whether an SPTE is present: large, or pointing at a shadow page."""
    return ent is not None


def is_large_pte(ent: object) -> bool:
    """Whether an SPTE is a large leaf, with no shadow page below it."""
    return ent is LARGE_SPTE


def to_shadow_page(ent: Any) -> kvm_mmu_page:
    """Return the page that an SPTE points at.  By this a walk *looks* at a child."""
    if not isinstance(ent, kvm_mmu_page):
        raise ValueError(f"no page behind {ent}: ask first what it is")  # noqa: TRY004
    tell("look", ent)
    return ent


def kvm_mmu_mark_parents_unsync(sp: kvm_mmu_page) -> None:
    """Mark every SPTE that points at `sp`, which kvm_unsync_page() has made unsync."""
    for parent, i in sp.parent_ptes:
        mark_unsync(parent, i)


def mark_unsync(sp: kvm_mmu_page, index: int) -> None:
    """Set bit `index` (0..511) of `sp`; if it is the first, mark the SPTEs to `sp`."""
    check_index(sp, index)
    if sp.unsync_child_bitmap & 1 << index:
        tell("marked", sp, index)
        return
    sp.unsync_child_bitmap |= 1 << index
    sp.unsync_children += 1
    tell("mark", sp, index)
    if sp.unsync_children > 1:
        return
    kvm_mmu_mark_parents_unsync(sp)


def clear_unsync_child_bit(sp: kvm_mmu_page, index: int) -> None:
    """Clear bit `index` (0..511) of `sp`, which must be set; `sp` alone changes."""
    check_index(sp, index)
    if not sp.unsync_child_bitmap & 1 << index or sp.unsync_children < 1:
        raise ValueError(f"[{index}] of {sp} is clear already: clear only a set bit")
    sp.unsync_children -= 1
    sp.unsync_child_bitmap ^= 1 << index
    tell("clear", sp, index)


# --------------------------------------------------------------------- the array


class kvm_mmu_pages:
    """The array that a walk fills, up to `capacity`: pages, `sp`; indexes, `idx`."""

    def __init__(self, capacity: int = KVM_PAGE_ARRAY_NR) -> None:
        self.capacity = check_range("a capacity", capacity, 1, sys.maxsize)
        self.sp, self.idx = list[kvm_mmu_page](), list[int]()

    @property
    def nr(self) -> int:
        return len(self.sp)

    def store(self, sp: kvm_mmu_page, idx: int = INVALID_INDEX) -> bool:
        """Store `sp`, and only then say whether the array is full, as KVM does."""
        if self.nr >= self.capacity:
            raise OverflowError(f"all {self.nr} entries are used: return -ENOSPC first")
        self.sp.append(sp)
        self.idx.append(idx)
        tell("add", sp, self)
        return self.nr == self.capacity


def mmu_pages_add(pvec: kvm_mmu_pages, sp: kvm_mmu_page, idx: int = -1) -> bool:
    """Store `sp`, unless it is unsync and there already; true if that filled the array.

    True does *not* say that there was no room for `sp`: see the thread's answer,
    CAJhGHyAoM+6cOh7XQUvavgJcUts53FW6BnjM_wqMD6fkoYoB3w@mail.gmail.com.
    """
    if sp.unsync and sp in pvec.sp:
        tell("again", sp, pvec)
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
        # bit was stale.  The review's contract: before the caller drops mmu_lock it has
        # to sync or zap all the array, *even on error*; and it can: a sync that fails
        # zaps the page.  That is not enough for is_unsync_root(), which takes no lock.
        clear_unsync_child_bit(sp, i)

    return nr_unsync_leaf


def for_each_set_bit(bitmap: int) -> Iterator[int]:
    """Yield the indexes of the bits that are set in `bitmap`, rising."""
    while bitmap > 0:
        lowest = bitmap & -bitmap
        yield lowest.bit_length() - 1
        bitmap ^= lowest


def mmu_unsync_walk(
    sp: kvm_mmu_page, pvec: kvm_mmu_pages, walk: Walk = __mmu_unsync_walk
) -> int:
    """Empty `pvec`, let `walk` fill it from below `sp`, and return what `walk` does."""
    gathers = getattr(walk, "gathers_parents", False)
    if gathers and pvec.capacity < sp.level:
        raise ValueError(f"{sp} takes {sp.level} entries or more, not {pvec.capacity}")
    tell("walk", sp, pvec)
    pvec.sp.clear()
    pvec.idx.clear()
    ret = 0
    if sp.unsync_children:
        if gathers:
            mmu_pages_add(pvec, sp, INVALID_INDEX)
        ret = walk(sp, pvec)
    tell("return", sp, ret)
    return ret


# Why this walk is right at any size, with either array [asserted by class Run, below].
# Before it, what is unsync or has bits has its bit set in every parent [expect_marked];
# under mmu_lock no one else marks or links.  A bit goes if behind it is no page; one in
# sync without bits; a stored one; or one whose walk is done, and left it no bits.  So
# that still holds, but for what is stored.  Hence, if it does not return -ENOSPC, all
# is stored; else the array is full of unsync pages [expect_kept].  The caller settles
# what is stored: each walk leaves fewer, and there is an end [hear].

# ------------------------------------------------------------------- the callers


def kvm_sync_page(sp: kvm_mmu_page) -> None:
    """Sync `sp`, an unsync page of level 1.  (In 5.19 its caller clears `unsync`.)"""
    if not sp.unsync or sp.level > PG_LEVEL_4K:
        raise ValueError(f"{sp!r} is not to be synced: sync unsync pages of level 1")
    sp.unsync = False
    tell("sync", sp)


def for_each_sp(pvec: kvm_mmu_pages) -> list[kvm_mmu_page]:
    """Return the level-1 pages of `pvec`, without parents that a walk gathered."""
    return [sp for sp in pvec.sp if sp.level == PG_LEVEL_4K]


def mmu_sync_children(
    parent: kvm_mmu_page, pvec: Pvec = None, walk: Walk = __mmu_unsync_walk
) -> int:
    """Sync every unsync page below `parent`, an array at a time; return how many."""
    pvec = pvec or kvm_mmu_pages()
    nr_synced = 0
    while mmu_unsync_walk(parent, pvec, walk):  # so also after -ENOSPC
        for sp in for_each_sp(pvec):
            kvm_sync_page(sp)
            nr_synced += 1
    return nr_synced


def is_unsync_root(root: kvm_mmu_page) -> bool:
    """Whether there may be anything to sync below `root`: asked *without* mmu_lock.

    A walk that clears the bits it follows, in any order, makes this false (save with
    -ENOSPC) before what it stored is synced: a vCPU that asks then skips its own sync.
    """
    return root.unsync or root.unsync_children > 0


def kvm_mmu_sync_roots(root: kvm_mmu_page, *pvec: Any, **walk: Any) -> None:
    """Do what a vCPU's TLB flush does with a `root` of level 4 or 5."""
    if is_unsync_root(root):  # KVM takes mmu_lock, not modelled, only after this
        mmu_sync_children(root, *pvec, **walk)


def mmu_zap_unsync_children(
    parent: kvm_mmu_page, pvec: Pvec = None, walk: Walk = __mmu_unsync_walk
) -> int:
    """Zap every unsync page below `parent`, an array at a time; return how many."""
    pvec = pvec or kvm_mmu_pages()
    zapped = 0
    while parent.level > PG_LEVEL_4K and mmu_unsync_walk(parent, pvec, walk):
        for sp in for_each_sp(pvec):
            kvm_mmu_prepare_zap_page(sp)
            zapped += 1
    return zapped


def kvm_mmu_prepare_zap_page(sp: kvm_mmu_page) -> None:
    """Zap the unsync pages below `sp`, then unlink `sp` from children and parents."""
    tell("zap", sp)
    mmu_zap_unsync_children(sp)
    for i in range(len(sp.spt)):
        mmu_page_zap_pte(sp, i)
    for parent, i in list(sp.parent_ptes):
        mmu_page_zap_pte(parent, i)
    sp.unsync = False


# ======================================== the thread's walks: from here on not KVM's

Caller = Callable[[kvm_mmu_page, kvm_mmu_pages, Walk], object]
Cost = namedtuple("Cost", "looks batches clears")


def gathers_parents(walk: Callable[..., int]) -> Callable[..., int]:
    """Mark `walk` as one that stores parents, too; mmu_unsync_walk() stores the root.

    Below page 2.0 two pages are unsync.  What an array of two has, and which bits stay:

    >>> for label, walk in WALKS.items():
    ...     pages, _ = build(([("2.0", 0, "1.0"), ("2.0", 1, "1.1")], "1.", 2))
    ...     _ = mmu_unsync_walk(pages[0], pvec := kvm_mmu_pages(2), walk)
    ...     print(f"{label:11}", *pvec.sp, bin(pages[0].unsync_child_bitmap))
    before      page 2.0 page 1.0 0b11
    posted      page 2.0 page 1.0 0b10
    check-first page 2.0 page 1.0 0b10
    series-end  page 1.0 page 1.1 0b0
    suggested   page 1.0 page 1.1 0b10
    """
    walk.gathers_parents = True  # type: ignore[attr-defined]
    return walk


class RefusingPages(kvm_mmu_pages):
    """The array as the review reads it: if it is full an add fails, and says so."""

    def store(self, sp: kvm_mmu_page, idx: int = INVALID_INDEX) -> bool:
        if full := mmu_is_page_vec_full(self):
            tell("refuse", sp)
        else:
            super().store(sp, idx)
        return full


@gathers_parents
def walk_before(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
    """`before`: the walk that 05/12 changes, and that Linux has to this day."""
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
def walk_posted(sp: kvm_mmu_page, pvec: kvm_mmu_pages, parents: bool = True) -> int:
    """`posted`: 05/12, 20220605064342.309219-6-jiangshanlai@gmail.com."""
    nr_unsync_leaf = 0

    for i in for_each_set_bit(sp.unsync_child_bitmap):
        ent = sp.spt[i]

        if not is_shadow_present_pte(ent) or is_large_pte(ent):
            clear_unsync_child_bit(sp, i)
            continue

        child = to_shadow_page(ent)

        if child.unsync_children:
            if parents and mmu_pages_add(pvec, child, i):
                return -ENOSPC

            ret = walk_posted(child, pvec, parents)
            if ret < 0:
                return ret
            nr_unsync_leaf += ret

        # The same contract; but the bit goes *before* the add: the review's question.
        clear_unsync_child_bit(sp, i)
        if child.unsync:
            nr_unsync_leaf += 1
            if mmu_pages_add(pvec, child, i if parents else INVALID_INDEX):
                return -ENOSPC

    return nr_unsync_leaf


def walk_series_end(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
    """`series-end`: 12/12, 05/12 without parents (10/12) and indexes (08/12)."""
    return walk_posted(sp, pvec, parents=False)


def mmu_is_page_vec_full(pvec: kvm_mmu_pages) -> bool:
    """Whether there is no room for a page.  (The resolution's; it is not in Linux.)"""
    return pvec.nr >= pvec.capacity


@gathers_parents
def walk_check_first(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
    """`check-first`: what the resolution asks for, Ytl+Tn8YBQR3KQFM@google.com."""
    nr_unsync_leaf = 0

    for i in for_each_set_bit(sp.unsync_child_bitmap):
        ent = sp.spt[i]

        # The C has gotos to the clear for what is not present, large, or has nothing.
        if is_shadow_present_pte(ent) and not is_large_pte(ent):
            child = to_shadow_page(ent)

            if child.unsync or child.unsync_children:
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

        clear_unsync_child_bit(sp, i)

    return nr_unsync_leaf


def for_each_sp_path(pvec: kvm_mmu_pages) -> Iterator[tuple[kvm_mmu_page, list[Any]]]:
    """Yield each level-1 page with its mmu_page_path: (page, index) from below."""
    parent, idx = dict[int, kvm_mmu_page](), dict[int, int]()
    for sp, i in zip(pvec.sp[:], pvec.idx[:]):
        parent[sp.level], idx[sp.level] = sp, i
        if sp.level == PG_LEVEL_4K:
            yield sp, [(parent[n + 1], idx[n]) for n in range(1, pvec.sp[0].level)]


def linux_caller(settle: Callable[[kvm_mmu_page], object]) -> Caller:
    """Return a caller as Linux has it, which deals with a page by `settle`."""

    def caller(root: kvm_mmu_page, pvec: kvm_mmu_pages, walk: Walk) -> None:
        while mmu_unsync_walk(root, pvec, walk):
            for sp, parents in for_each_sp_path(pvec):
                settle(sp)
                for parent, i in parents:  # KVM's mmu_pages_clear_parents()
                    clear_unsync_child_bit(parent, i)
                    if parent.unsync_children:
                        break

    return caller


def sync_carelessly(root: kvm_mmu_page, pvec: kvm_mmu_pages, walk: Walk) -> None:
    """Break the contract: drop what is in the array after -ENOSPC, and walk again."""
    while ret := mmu_unsync_walk(root, pvec, walk):
        for sp in for_each_sp(pvec) if ret != -ENOSPC else ():
            kvm_sync_page(sp)


# `linux` is the walk of `before` with callers that clear bits, which 04/12 takes away.
VARIANTS: dict[str, tuple[Walk, Caller]] = {
    "linux": (walk_before, linux_caller(kvm_sync_page)),
    "before": (walk_before, mmu_sync_children),
    "posted": (walk_posted, mmu_sync_children),
    "check-first": (walk_check_first, mmu_sync_children),
    "series-end": (walk_series_end, mmu_sync_children),
    "suggested": (__mmu_unsync_walk, mmu_sync_children),
}
WALKS = {label: walk for label, (walk, _) in VARIANTS.items() if label != "linux"}

# ================================================== building, drawing and telling


def kvm_unsync_page(sp: kvm_mmu_page) -> None:
    """Make `sp`, of level 1, unsync and findable: the guest may write its table."""
    if sp.level > PG_LEVEL_4K:
        raise ValueError(f"only a page of level 1 can be unsync, not {sp!r}")
    sp.unsync = True
    tell("write", sp)
    kvm_mmu_mark_parents_unsync(sp)


def link_shadow_page(parent: kvm_mmu_page, index: int, child: kvm_mmu_page) -> None:
    """Let SPTE `index` (0..511) of `parent` point at `child`, mark it if need be."""
    check_index(parent, index)
    if child.level != parent.level - 1:
        raise ValueError(f"{child!r} is not of the level below {parent!r}")
    if parent.spt[index] not in (None, LARGE_SPTE):
        raise ValueError(f"SPTE {index} of {parent} points at a page: zap it first")
    parent.spt[index] = child
    child.parent_ptes.append((parent, index))
    if child.unsync_children or child.unsync:
        mark_unsync(parent, index)


def mmu_page_zap_pte(parent: kvm_mmu_page, index: int) -> None:
    """Make SPTE `index` (0..511) of `parent` not present; its bit may be stale now."""
    check_index(parent, index)
    if isinstance(parent.spt[index], kvm_mmu_page):
        parent.spt[index].parent_ptes.remove((parent, index))
    parent.spt[index] = None


def set_large_spte(parent: kvm_mmu_page, index: int) -> None:
    """Unlink SPTE `index` (0..511) of `parent`, level 2 or 3; make it a large leaf."""
    check_range("the level of a large SPTE", parent.level, PG_LEVEL_2M, PG_LEVEL_1G)
    mmu_page_zap_pte(parent, index)
    parent.spt[index] = LARGE_SPTE


def shadow_page_at(root: kvm_mmu_page, gva: int) -> kvm_mmu_page:
    """Return the level-1 page for address `gva` of the guest; link what is missing."""
    bits = PAGE_SHIFT + SPTE_LEVEL_BITS * root.level
    check_range("an address", gva, 0, (1 << bits) - 1)
    sp = root
    while sp.level > PG_LEVEL_4K:
        shift = PAGE_SHIFT + SPTE_LEVEL_BITS * (sp.level - 1)
        i = gva >> shift & SPTE_ENT_PER_PAGE - 1
        if is_large_pte(sp.spt[i]):
            raise ValueError(f"{gva:#x} is in large SPTE {i} of {sp}: zap it first")
        if not is_shadow_present_pte(sp.spt[i]):
            gfn = gva >> shift << shift - PAGE_SHIFT
            link_shadow_page(sp, i, kvm_mmu_page(sp.level - 1, gfn))
        sp = sp.spt[i]
    return sp


def check_range(what: str, value: int, low: int, high: int) -> int:
    if not low <= as_int(value) <= high:
        raise ValueError(f"{what} must be {low} to {high}, not {value}")
    return value


def check_index(sp: kvm_mmu_page, index: int) -> None:
    if sp.level == PG_LEVEL_4K:
        raise ValueError(f"{sp!r} has no children: give a page above level 1")
    if not 0 <= index < SPTE_ENT_PER_PAGE:
        raise IndexError(f"the index of an SPTE must be 0 to 511, not {index}")


def ways(root: kvm_mmu_page) -> Counter[kvm_mmu_page]:
    """Return `root` and all pages below it, and by how many ways each is reached."""
    found = Counter({root: 1})
    for sp in (queue := [root]):
        for ent in filter(None, sp.spt):
            if not is_large_pte(ent):
                queue += [ent] * (ent not in found)
                found[ent] += found[sp]
    return found


def draw(*pages: Any, drawn: Any = ()) -> str:
    """Return `pages` as ASCII trees: SPTE i is [i], or [i*] if its bit is set."""
    lines, drawn = [], drawn or {None}
    for sp in pages:
        spt, bits = getattr(sp, "spt", ()), getattr(sp, "unsync_child_bitmap", 0)
        slots = [i for i, ent in enumerate(spt) if ent or bits >> i & 1]
        again = ", as above" if slots and sp in drawn else ""
        lines += [(sp if isinstance(sp, str) else repr(sp)) + again]
        drawn.add(sp)
        for i in slots if not again else ():
            fork, margin = ("`-", "  ") if i == slots[-1] else ("|-", "| ")
            first, *rest = draw(spt[i] or "not present", drawn=drawn).splitlines()
            lines += [f"{fork}[{i}{' *'[bits >> i & 1]}] {first}"]
            lines += [margin + line for line in rest]
    return "\n".join(lines)


listeners: list[Callable[[str, kvm_mmu_page, Any], None]] = []
LINES = {
    "mark": "mark   [{1}] of {0}: {0.unsync_children} set",
    "marked": "mark   [{1}] of {0}: set already",
    "add": "add    {0}: entry {1.nr} of {1.capacity}",
    "clear": "clear  [{1}] of {0}: {0.unsync_children} left",
    "return": "return {1}",
}


def tell(what: str, sp: kvm_mmu_page, detail: Any = None) -> None:
    """Tell all who listen what is done to `sp`, with an index, an array or a result."""
    for hear in listeners:
        hear(what, sp, detail)


class Broken(BaseException):
    """A promise is broken, as this says; not for a walk to catch."""


def listen(hear: Callable[..., None], call: Callable[..., object], *args: Any) -> str:
    """Call call(*args), hear() all that is told; return the promise that is broken."""
    listeners.append(hear)
    try:
        call(*args)
    except Broken as broken:
        return str(broken)
    finally:
        listeners.remove(hear)
    return ""


class Run:
    """What a caller that starts at `root` does to `pages`, as it is heard: `told`."""

    def __init__(self, root: kvm_mmu_page, walk: Walk, pages: Any) -> None:
        self.root, self.pages = root, list(pages)
        self.gathers = getattr(walk, "gathers_parents", False)
        self.misled, self.at, self.nr_walks = "", 0, 2  # try_on() counts from 0
        self.told, self.walks = list[str](), list[Any]()
        self.arrays, self.cleared = set[kvm_mmu_pages](), dict[Any, int]()

    def hear(self, what: str, sp: kvm_mmu_page, detail: Any) -> None:
        if what == "walk":
            self.expect_marked(self.arrays - {detail})
            self.nr_walks += 1
            if self.nr_walks == 2:
                self.write()
            self.arrays.add(detail)
            self.walks.append((sp, detail, ways(sp), self.state()))
        depth = self.walks[-1][0].level - sp.level if self.walks else 0
        depth = sp.level - 1 if "mark" in what else depth + (what == "clear")
        said = "-ENOSPC" if what == "return" and detail == -ENOSPC else detail
        line = LINES.get(what, "{2:6} {0!r}").format(sp, said, what)
        self.told.append("  " * depth + line)
        if len(self.told) > 400 + 20 * len(self.pages) ** 2:
            raise Broken("there is no end to it")
        if what == "return":
            self.expect_kept(detail, *self.walks.pop())
        elif what == "clear":
            self.cleared[sp, detail] = len(self.told) - 1
            if sp is self.root and not (is_unsync_root(sp) or sp.parent_ptes):
                unsync = [page for page in ways(sp) if page.unsync]
                if unsync and not self.misled:
                    self.misled = f"is_unsync_root() is false, {unsync[0]} is unsync"
                    self.told[-1] += f"   <-- {self.misled}"
                    self.at = len(self.told)

    def write(self) -> None:
        """Let the guest write all it can; KVM passes over what is unsync already."""
        for sp in self.pages:
            if not (sp.unsync or sp.spt) and sp.parent_ptes:
                kvm_unsync_page(sp)

    def state(self) -> tuple[list[int], list[Any]]:
        """Return the bits, and what a walk is to leave alone."""
        rest = [(sp.unsync, sp.parent_ptes[:], sp.spt[:]) for sp in self.pages]
        return [sp.unsync_child_bitmap for sp in self.pages], rest

    def expect_marked(self, arrays: set[kvm_mmu_pages]) -> None:
        """Expect that bits lead to what is unsync, but for what is in `arrays`."""
        for sp in self.pages:
            bits, nr = f"{sp.unsync_child_bitmap:b}".count("1"), sp.unsync_children
            if bits != nr:
                raise Broken(f"{sp} has {bits} bits set, but unsync_children {nr}")
            # What has bits set counts, too, as marking stops there.
            if not nr and (not sp.unsync or any(sp in pvec.sp for pvec in arrays)):
                continue
            for parent, i in sp.parent_ptes:
                if not parent.unsync_child_bitmap >> i & 1:
                    if at := self.cleared.get((parent, i)):
                        self.told[at] += f"   <-- {sp} is {'cut off' if nr else 'lost'}"
                    what = "has bits set" if nr else "is unsync"
                    bit = f"[{i}] of {parent}, which leads to it"
                    raise Broken(f"{sp} {what}, but {bit}, is clear")

    def expect_kept(self, ret: Any, root: Any, pvec: Any, found: Any, was: Any) -> None:
        """Expect what a walk promises of its result, its array and the bits."""
        self.expect_marked(self.arrays)
        (old, rest), (new, now), stored = was, self.state(), {*pvec.sp}
        leaves, unsync = for_each_sp(pvec), {sp for sp in found if sp.unsync}
        count = range(len(unsync), sum(found[sp] for sp in unsync) + 1)
        error, used = ret == -ENOSPC, f"{pvec.nr} of {pvec.capacity} entries used"
        for kept, sentence in [
            (type(ret) is int, f"a walk returns an int, not {ret!r}"),
            (rest == now, "a walk changes nothing but bits and its array"),
            (not any(b & ~a for a, b in zip(old, new)), "a walk sets no bits"),
            (pvec.nr <= pvec.capacity, f"no more is stored than fits, not {used}"),
            (self.gathers or leaves == pvec.sp, "parents take a @gathers_parents"),
            (unsync >= {*leaves}, "what is stored is unsync, and below the root"),
            (len({*leaves}) == len(leaves), "no page is stored twice"),
            (not error or pvec.nr == pvec.capacity, f"-ENOSPC returned with {used}"),
            (error or unsync <= stored, f"{ret} returned, but not all is stored"),
            (error or ret in count, f"{ret} returned, not {count[0]}..{count[-1]}"),
        ]:
            if not kept:
                raise Broken(sentence)


def narrate(
    root: Any, pvec: Any, walk: Any = __mmu_unsync_walk, caller: Any = mmu_unsync_walk
) -> str:
    """Walk from `root`, or let `caller` do it, and return a line for each step."""
    run = Run(root, walk, ways(root))
    broken = listen(run.hear, caller, root, pvec, walk)
    return "\n".join([*run.told, *[f"FAILS: {broken}"] * bool(broken)])


# ================================================= a walk judged, the answer, the demo

# A table: SPTEs, ("2.1", 64, "1.0" or "large" or "absent"); unsync pages; array's size.


def small_tables(most: int, pages: tuple[str, ...], sptes: Any = ()) -> Iterator[Any]:
    """Yield every table of up to `most` more SPTEs in `pages`, for two array sizes."""
    leaves = [page for page in pages if page < "2"]
    for picks in product((True, False), repeat=len(leaves)):
        for size in (1, 16) if sptes else ():
            yield sptes, tuple(compress(leaves, picks)), size
    # An SPTE is in the page of the last one or a later, so that no table comes twice.
    at = pages.index(sptes[-1][0]) if sptes else 0
    for page in [page for page in pages[at:] if page > "2" and most]:
        index = (0, 64, 511)[sum(spte[0] == page for spte in sptes)]
        known = [other for other in pages if int(other[0]) == int(page[0]) - 1]
        new = f"{int(page[0]) - 1}.{len(known)}"
        for ent in [*known, new, "absent", *["large"] * (page < "4")]:
            more = (*pages, new) if ent == new else pages
            yield from small_tables(most - 1, more, (*sptes, (page, index, ent)))


def tables() -> list[Any]:
    """Return every small table, those of few SPTEs first, and then larger ones."""
    found = [table for top in "234" for table in small_tables(3, (f"{top}.0",))]
    found.sort(key=lambda table: len(table[0]))
    for seed in range(16):  # three roots of level 2 to 5, and pages with many parents
        rng, sptes = Random(seed), []
        for level, n in product(range(2 + seed % 4, 1, -1), range(3)):
            ents = [f"{level - 1}.{n}" for n in range(9 if level == 2 else 3)]
            ents += ["absent", "large"][: 2 if level < 4 else 1]
            for i in rng.sample(range(SPTE_ENT_PER_PAGE), rng.choice((1, 3, 6))):
                sptes.append((f"{level}.{n}", i, rng.choice(ents)))
        found.append((tuple(sptes), ("1.",), (1, 2, 3, 5, 16, 40)[seed % 6]))
    for nr, size in (70, 16), (512, 600):  # one page with many children
        sptes = [("2.0", n, f"1.{n}") for n in range(nr)]
        found.append((tuple(sptes), ("1.",), size))
    return found


def build(table: Any) -> tuple[list[kvm_mmu_page], list[kvm_mmu_page]]:
    """Return the pages of a table, and its roots; the bits of all its SPTEs are set."""
    sptes, unsync, _ = table
    names = {name for spte in sptes for name in spte[::2] if name < "9"}
    pages = {name: kvm_mmu_page(int(name[0]), name=f"page {name}") for name in names}
    for name, i, ent in sptes:
        if ent == "large":
            set_large_spte(pages[name], i)
        elif ent in pages:
            link_shadow_page(pages[name], i, pages[ent])
        mark_unsync(pages[name], i)
    for name in filter(lambda name: name.startswith(unsync), names):
        kvm_unsync_page(pages[name])
    found = [pages[name] for name in sorted(names, reverse=True)]
    return found, [sp for sp in found if sp.spt and not sp.parent_ptes]


def try_on(table: Any, walk: Any, array: Any, caller: Any) -> tuple[Run, str]:
    """Let `caller` deal with each root of a table twice; return how, and what broke."""
    pages, roots = build(table)
    run = Run(roots[0], walk, pages)
    pvec = array(max(table[2], roots[0].level * run.gathers))

    def deal() -> None:
        for run.root in roots * 2:
            run.nr_walks = 0
            caller(run.root, pvec, walk)
            run.expect_marked(set())
            for sp in ways(run.root):
                if sp.unsync:
                    raise Broken(f"the caller ends, but {sp} is unsync")
            run.write()

    try:
        return run, listen(run.hear, deal)
    except Exception as error:  # noqa: BLE001
        ours = isinstance(error, (ValueError, IndexError, OverflowError))
        said = f"{error}" if ours else f"{type(error).__name__}: {error}"
        return run, f"the {'walk' if run.walks else 'caller'} raises: {said}"


class Verdict(str):
    fine = lockless = True  # what judge() has to say, in two words


def judge(
    walk: Any, array: Any = kvm_mmu_pages, caller: Any = mmu_sync_children, on: Any = ()
) -> Verdict:
    """Judge a walk and its caller `on` tables (or all), up to one that is not fine."""
    lockless, misled, case = True, "", list[str]()
    for table in on or tables():
        run, broken = try_on(table, walk, array, caller)
        if broken or run.misled and lockless:
            misled, steps = run.misled, run.told if broken else run.told[: run.at]
            case = draw(*build(table)[1]).splitlines() + steps
        lockless = lockless and not run.misled
        if broken:
            break
    if len(case) > 28:
        case[14:-13] = [f"... {len(case) - 27} lines ..."]
    said = f"FAILS: {broken}" if broken else "fine on all tables"
    read = ("not known" if lockless else "misled") if broken else misled or "not misled"
    verdict = Verdict("\n".join([said, f"read without mmu_lock: {read}", *case]))
    verdict.fine, verdict.lockless = not broken, lockless
    return verdict


def cost(
    root: kvm_mmu_page, walk: Walk, pvec: kvm_mmu_pages, caller: Any = mmu_sync_children
) -> Cost:
    """Count looks at children, walks that return non-zero, and the caller's clears."""
    count: Counter[Any] = Counter()

    def hear(what: str, sp: kvm_mmu_page, detail: Any) -> None:
        count["walking"] += (what == "walk") - (what == "return")
        count[what, count["walking"] > 0] += what != "return" or detail != 0

    listen(hear, caller, root, pvec, walk)
    return Cost(count["look", True], count["return", False], count["clear", False])


def answer_table() -> str:
    """Return what VARIANTS do on all tables of up to 2 SPTEs, and what they cost."""
    line = "{:12}{:>7}{:>17}{:>6}{:>8}{:>7}{:>9}{:>8}".format
    rows = [line("", "parents", "lost if refused", "lost", "misled", *Cost._fields)]
    small = [t for top in "234" for t in small_tables(2, (f"{top}.0",)) if t[1]]
    for label, (walk, caller) in VARIANTS.items():
        refused = judge(walk, RefusingPages, caller, small)
        kvm = judge(walk, kvm_mmu_pages, caller, small)
        no = not hasattr(walk, "gathers_parents"), refused.fine, kvm.fine, kvm.lockless
        price = cost(dense(), walk, kvm_mmu_pages(), caller)
        rows.append(line(label, *["no" if fine else "yes" for fine in no], *price))
    return "\n".join(rows)


def dense() -> kvm_mmu_page:
    """Return a root with 32 x 32 unsync pages, 32 below each of 32 of level 2."""
    root = kvm_mmu_page(4)
    for i, j in product(range(32), repeat=2):
        kvm_unsync_page(shadow_page_at(root, i << 30 | j << 21))
    return root


def process(unsync: bool) -> list[kvm_mmu_page]:
    """Return the pages of a small process, its root first, with two to be `unsync`."""
    root = kvm_mmu_page(4)
    leaves = [shadow_page_at(root, i << 21) for i in (3, 4)]
    for sp, name in zip(ways(root), ("root", "pud", "pmd", "data", "heap")):
        sp.name = name
    for sp in leaves if unsync else ():
        kvm_unsync_page(sp)
    return [*ways(root)]


def demo() -> str:
    """Return what `python unsync_walk.py` prints."""
    (root, _, _, *leaves), pvec = process(unsync=False), kvm_mmu_pages()
    marks = narrate(root, pvec, caller=lambda *_: list(map(kvm_unsync_page, leaves)))
    tree, steps, told = draw(root), narrate(root, pvec), is_unsync_root(root)
    kvm_mmu_sync_roots(root)  # vCPU B
    stale = ", ".join(sp.name for sp in leaves if sp.unsync)
    again, _, pmd, *_ = process(unsync=True)
    linux = mmu_unsync_walk(again, pvec, walk_before) > 0 and is_unsync_root(again)
    refused, _, _ = narrate(pmd, RefusingPages(2), walk_posted).rpartition("\n")
    return f"""\
05/12 lets KVM's unsync walk clear a bit, and then add the page behind it to an
array.  Wrong, if the add fails?  It never does: it stores, then says "full".
A guest writes two page tables; KVM marks the ways to their shadow pages:
{marks}
{tree}
On its TLB flush vCPU A takes mmu_lock, and walks as the review suggests:
{steps}
Before A syncs, vCPU B flushes: is_unsync_root(), asked without lock, is {told}.
B does not sync; it may use old SPTEs of {stale}.  (With Linux's walk: {linux}.)

If a full array refused, 05/12 would lose a page (walk from pmd, array of 2):
{refused}
KVM's array says "full" at entry 2: the walk returns there, and [4] stays set.
{answer_table()}
before: 04/12 alone; posted: 05/12; check-first: resolution; series-end: 12/12;
suggested: review.  misled: as B.  looks, walks not 0, caller's clears: 32 x 32."""


def main(argv: list[str]) -> int:
    """Do what the arguments ask for, and return the exit status."""
    import argparse
    import runpy

    parser = argparse.ArgumentParser(description="Show KVM's unsync walk.")
    parser.add_argument("--walk", choices=VARIANTS, help="tell its steps")
    parser.add_argument("--judge", metavar="FILE:NAME", help="judge a walk of your own")
    given = parser.parse_args(argv)
    if given.walk:
        print(draw(root := process(unsync=True)[0]))
        print(narrate(root, kvm_mmu_pages(), *VARIANTS[given.walk]))
    elif given.judge:
        path, _, name = given.judge.rpartition(":")
        sys.modules.setdefault("unsync_walk", sys.modules[__name__])
        try:
            own = pathlib.Path(path).samefile(__file__)
            walk = (globals() if own else runpy.run_path(path))[name]
            if not callable(walk):
                raise TypeError(f"{walk!r} is no function")
        except (Exception, SystemExit) as error:  # noqa: BLE001
            parser.exit(2, f"no walk at {given.judge!r}, give FILE:NAME: {error!r}\n")
        kvm, refusing = judge(walk), judge(walk, RefusingPages)
        (said, *case), (refused, _, *other) = kvm.splitlines(), refusing.splitlines()
        print(f"with KVM's array: {said}\nif a full array refused: {refused}")
        print(*case, *(other if kvm.fine and kvm.lockless else ()), sep="\n")
        return int(not kvm.fine)
    else:
        print(demo())
    return 0


# ========================================================================== the tests

README = pathlib.Path(__file__).with_name("README.md")
MISUSE = """\
ValueError: kvm_mmu_page(6); kvm_mmu_pages(0); kvm_unsync_page(pmd); kvm_sync_page(leaf)
ValueError: mark_unsync(leaf, 0); clear_unsync_child_bit(pmd, 7); to_shadow_page(3)
ValueError: link_shadow_page(root, 0, pmd); link_shadow_page(pmd, 7, kvm_mmu_page(1))
ValueError: shadow_page_at(pmd, 1 << 30); shadow_page_at(pmd, 8 << 21)
ValueError: narrate(pmd, one, walk_posted); set_large_spte(root, 0)
IndexError: link_shadow_page(pmd, -1, leaf); mark_unsync(pmd, 512)
TypeError: kvm_mmu_page(1.5); kvm_mmu_page(2, None); shadow_page_at(root, 0.5)
OverflowError: mmu_pages_add(one, pmd)"""
AFTER_A_WALK_AND_VERDICT = """\
setattr(sp, "unsync_children", 9) or ret -> 0 bits set, but unsync_children 9
setattr(sp.spt[9], "unsync", False) or ret -> a walk changes nothing but
mark_unsync(sp, 8) or ret -> a walk sets no bits
pvec.sp.extend(pvec.sp * 16) or ret -> no more is stored than fits
pvec.sp.append(sp) or ret -> @gathers_parents
pvec.sp.append(kvm_mmu_page(1)) or ret -> below the root
pvec.sp.extend(pvec.sp) or ret -> stored twice
-ENOSPC -> -ENOSPC returned with 1 of 16
ret + 1 -> 2 returned, not 1..1
bool(ret) -> returns an int
[*iter(lambda: to_shadow_page(sp), 0)] -> no end"""


class Tests(unittest.TestCase):
    def test_misuse(self) -> None:
        leaf, pmd, root, one = *map(kvm_mmu_page, (1, 2, 4)), kvm_mmu_pages(1)
        link_shadow_page(pmd, 7, leaf)
        set_large_spte(pmd, 8)
        mmu_pages_add(one, leaf)
        before = draw(pmd, root), one.sp[:]
        for error, calls in [line.split(": ") for line in MISUSE.splitlines()]:
            for call in calls.split("; "):
                with self.assertRaises(eval(error), msg=call):
                    eval(call)
        self.assertEqual(before, (draw(pmd, root), one.sp))

    def test_history(self) -> None:
        pages = [kvm_mmu_page(level) for level in (1, 1, 1, 1, 2, 2, 2, 3, 3, 4)]
        settle = mmu_sync_children, mmu_zap_unsync_children, kvm_mmu_prepare_zap_page
        calls: Any = [(call, 1) for call in (*settle, kvm_unsync_page)]
        calls += [(set_large_spte, 2), (mmu_page_zap_pte, 2), (link_shadow_page, 3)]
        run, choice = Run(pages[0], walk_before, pages), Random(12).choice
        for _ in range(400):
            (call, nr), sp, i, child = map(choice, (calls, pages, (0, 511), pages))
            unsync = sum(page.unsync for page in ways(sp)) - sp.unsync
            with suppress(ValueError):
                ret = call(*(sp, i, child)[:nr])
                if call in settle:
                    self.assertIn((ret, sp.unsync_children), ((unsync, 0), (None, 0)))
            run.expect_marked(set())

    def test_verdicts(self) -> None:
        self.assertRegex(demo(), r"\A(.{0,80}\n){20,49}.{0,80}\Z")
        self.assertEqual(sum(i for sptes, *_ in tables() for _, i, _ in sptes), 407541)
        for label, (walk, caller) in VARIANTS.items():
            kvm = judge(walk, caller=caller)
            self.assertTrue(kvm.fine, label)
            self.assertEqual(kvm.lockless, label in ("linux", "before"), label)
            refusing = judge(walk, RefusingPages, caller, tables()[::8])
            self.assertEqual(refusing.fine, label not in ("posted", "series-end"))

    def test_promises(self) -> None:
        one: Any = [((("2.0", 9, "1.0"),), ("1.0",), 16)]
        for line in AFTER_A_WALK_AND_VERDICT.splitlines():
            deed, said = line.split(" -> ")
            walk = f"lambda sp, pvec: (lambda ret: {deed})(walk_series_end(sp, pvec))"
            self.assertIn(said, judge(eval(walk), on=one).splitlines()[0])

    def test_contract(self) -> None:
        self.assertFalse(judge(walk_before, caller=linux_caller(id)).lockless)
        self.assertIn("is lost", judge(walk_posted, caller=sync_carelessly))
        self.assertTrue(judge(walk_posted, caller=mmu_zap_unsync_children).fine)
        told = narrate(process(True)[0], kvm_mmu_pages(), caller=kvm_mmu_sync_roots)
        self.assertEqual([told.count(word) for word in ("write", "\nsync")], [0, 2])
        # The resolution's walk: the array is full, but nothing was to be added.
        table = [("2.0", i, f"1.{i % 15}") for i in range(16)], "1.", 16
        ret = mmu_unsync_walk(build(table)[0][0], kvm_mmu_pages(), walk_check_first)
        self.assertEqual(ret, -ENOSPC)

    @unittest.skipUnless(README.exists(), "README.md is not here")
    def test_readme(self) -> None:
        text = README.read_text()
        lines = text.split("```python\n")[1].split("```")[0].splitlines()
        slip = [*lines[:3], lines[-2][4:], *lines[3:-3], lines[-1]]
        exec("\n".join(slip), space := {**globals()})  # noqa: S102
        self.assertIn(judge(space["walk"]).splitlines()[0], text.replace("\n", " "))
        exec("\n".join(lines), space)  # noqa: S102
        kvm, refusing = judge(space["walk"]), judge(space["walk"], RefusingPages)
        self.assertTrue(kvm.fine and kvm.lockless and refusing.fine)
        self.assertEqual(cost(dense(), space["walk"], kvm_mmu_pages()).looks, 1249)
        figures = {word for word in re.split(r"\D+", text) if len(word) == 4}
        self.assertLessEqual(figures - {"2022"}, {*answer_table().split()})
        sptes = [("3.0", 0, "2.0"), ("3.0", 1, "2.1")]
        sptes += [(f"2.{k}", i, f"1.{i}") for k in (0, 1) for i in range(16)]
        for label, looks in ("linux", 38), ("posted", 35):
            root, (walk, caller) = build((sptes, "1.", 0))[1][0], VARIANTS[label]
            self.assertEqual(cost(root, walk, kvm_mmu_pages(), caller).looks, looks)


def load_tests(loader: object, tests: unittest.TestSuite, pattern: object) -> object:
    import doctest

    tests.addTests(doctest.DocTestSuite(__name__))
    if README.exists():
        tests.addTests(doctest.DocFileSuite(str(README), module_relative=False))
    return tests


# `import *` is to bring the walk, too, whose name begins with underscores.
__all__ = [name for name in globals() if name[0] != "_" or name == "__mmu_unsync_walk"]

if __name__ == "__main__":
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGTERM), signal.SIG_DFL)  # | head
    sys.exit(main(sys.argv[1:]))
