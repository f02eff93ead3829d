# SPDX-License-Identifier: GPL-2.0-only
"""KVM's unsync walk as a model that runs: one file, to be read beside its thread.

__mmu_unsync_walk() here is the walk that the review suggests, and there it is called
__mmu_unsync_walk_and_clear().  Linux's own, which it still has, is walk_before() here.
Most of what KVM has (arch/x86/kvm/mmu/) keeps its name.

Where KVM shadows page tables, each in use has a *shadow page* or more.  Where it maps
one of level 1 writable, the guest may change that unseen: its page is *unsync*.  When a
vCPU flushes its whole TLB, KVM must find all such pages below a root, and sync or zap
them; miss one, and a stale translation stays in use.  Each entry (SPTE) has a bit:

* A set bit promises little: an unsync page *may* be behind it; if not, it is *stale*.
* A clear bit promises that none is.  But a walk may clear bits of what it has put in
  its array.  Hence the contract of such a walk: before it drops mmu_lock, the caller
  must sync or zap *all* pages in the array, also when the walk returned -ENOSPC.

05/12, a patch of 2022, clears a bit, then adds the page behind it to the array.  Its
review (YtcLiNskPb8z/2Qc@google.com) asks: what if the add fails?  It never does.  But
in *any* order such a walk can mislead a reader without the lock: see is_unsync_root().

Short names are the C's: `sp` is a shadow page, `spt` its SPTEs, `ent` one of them, `i`
the index of an SPTE and of its bit, `pvec` the array, `nr` how many, `ret` a result.
A misused step changes nothing and raises IndexError (an SPTE outside 0..511), TypeError
(no number), OverflowError (KVM would write past its array), or mostly ValueError.
"""

from __future__ import annotations

import io
import pathlib
import re
import signal
import sys
import traceback
import unittest
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import redirect_stdout, suppress
from errno import ENOSPC
from functools import lru_cache, wraps
from itertools import chain, compress, islice, product
from operator import index as as_int
from random import Random
from typing import Any, NamedTuple, Optional

PG_LEVEL_4K, PG_LEVEL_2M, PG_LEVEL_1G = 1, 2, 3
PT64_ROOT_4LEVEL, PT64_ROOT_MAX_LEVEL = 4, 5
SPTE_LEVEL_BITS, SPTE_ENT_PER_PAGE, PAGE_SHIFT = 9, 512, 12
KVM_PAGE_ARRAY_NR, INVALID_INDEX = 16, -1

Pages = Collection["kvm_mmu_page"]
Pvec = Optional["kvm_mmu_pages"]
Walk = Callable[["kvm_mmu_page", "kvm_mmu_pages"], int]
Caller = Callable[["kvm_mmu_page", "kvm_mmu_pages", Walk], object]
Kind = Callable[[], Iterable["Table"]]  # of tables: small_tables(), for example

listeners: list[Callable[[str, kvm_mmu_page, object], None]] = []


def tell(what: str, sp: kvm_mmu_page, detail: object = None) -> None:
    """Tell all who listen what is done to `sp`, with an index, an array or a result."""
    for hear in listeners:
        hear(what, sp, detail)


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
        self.unsync = False
        self.unsync_children = 0  # how many bits are set
        self.unsync_child_bitmap = 0  # bit i is for SPTE i

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


def to_shadow_page(ent: object) -> kvm_mmu_page:
    """Return the page that an SPTE points at.  By this a walk *looks* at a child."""
    if not isinstance(ent, kvm_mmu_page):
        raise ValueError(f"{ent!r} is no page: ask first, or the SPTE is corrupt")  # noqa: TRY004
    tell("look", ent)
    return ent


def kvm_mmu_mark_parents_unsync(sp: kvm_mmu_page) -> None:
    """Mark all SPTEs that point at `sp`, which is unsync now, or has its first bit."""
    for parent, i in sp.parent_ptes:
        mark_unsync(parent, i)


def mark_unsync(sp: kvm_mmu_page, index: int) -> None:
    """Set bit `index` (0..511) of `sp`; if it is the first, mark the SPTEs to `sp`."""
    check_index(sp, index)
    if sp.unsync_child_bitmap & 1 << index:
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
        self.sp: list[kvm_mmu_page] = []
        self.idx: list[int] = []

    def __repr__(self) -> str:
        return f"{self.nr} of {self.capacity}: " + "; ".join(map(str, self.sp))

    @property
    def nr(self) -> int:
        return len(self.sp)

    def store(self, sp: kvm_mmu_page, idx: int = INVALID_INDEX) -> bool:
        """Store `sp`, and only then say whether the array is full, as KVM does."""
        if len(self.sp) >= self.capacity:
            raise OverflowError(f"all {self.nr} entries are used: return -ENOSPC first")
        self.sp.append(sp)
        self.idx.append(idx)
        tell("add", sp, self)
        return len(self.sp) == self.capacity


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
    """Add the unsync pages below `sp` to `pvec`, and clear the bits that are done with.

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
    """Yield the indexes of the bits set in `bitmap`, rising.  (KVM reads it live.)"""
    while bitmap > 0:
        lowest = bitmap & -bitmap
        yield lowest.bit_length() - 1
        bitmap ^= lowest


def mmu_unsync_walk(
    sp: kvm_mmu_page, pvec: kvm_mmu_pages, walk: Walk = __mmu_unsync_walk
) -> int:
    """Empty `pvec`, let `walk` fill it from below `sp`, and return what `walk` does."""
    gathers = does_gather(walk)
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


# ------------------------------------------------------- the callers, as of 04/12


def kvm_sync_page(sp: kvm_mmu_page) -> None:
    """Sync `sp`, an unsync page of level 1.  (Does kvm_unlink_unsync_page(), too.)"""
    if not sp.unsync or sp.level > PG_LEVEL_4K:
        raise ValueError(f"{sp!r} is not to be synced: sync unsync pages of level 1")
    tell("sync", sp)
    sp.unsync = False


def for_each_sp(pvec: kvm_mmu_pages) -> list[kvm_mmu_page]:
    """Return the level-1 pages of `pvec`, without parents that a walk gathered."""
    return [sp for sp in pvec.sp if sp.level == PG_LEVEL_4K]


def mmu_sync_children(
    parent: kvm_mmu_page, pvec: Pvec = None, walk: Walk = __mmu_unsync_walk
) -> int:
    """Sync every unsync page below `parent`, an array at a time; return how many."""
    if pvec is None:
        pvec = kvm_mmu_pages()
    nr_synced = 0
    while mmu_unsync_walk(parent, pvec, walk):  # so also after -ENOSPC
        for sp in for_each_sp(pvec):
            kvm_sync_page(sp)
            nr_synced += 1
    return nr_synced


def is_unsync_root(root: kvm_mmu_page) -> bool:
    """Whether there may be anything to sync below `root`: asked *without* mmu_lock.

    KVM asks so where the tables shadowed have 4 or 5 levels; with fewer it locks first.
    As we read it, a walk that clears the bits it follows, in any order, from `root` (if
    it does not return -ENOSPC) or from above, can make this false before what it stored
    is synced.  mmu_try_to_unsync_pages() has a comment on the same reader.
    """
    return root.unsync or root.unsync_children > 0


def kvm_mmu_sync_roots(
    root: kvm_mmu_page, pvec: Pvec = None, walk: Walk = __mmu_unsync_walk
) -> None:
    """Do what a flush of a vCPU's whole TLB does, if it asks is_unsync_root() first."""
    if is_unsync_root(root):  # KVM takes mmu_lock, not modelled, only after this
        mmu_sync_children(root, pvec, walk)


def mmu_zap_unsync_children(
    parent: kvm_mmu_page, pvec: Pvec = None, walk: Walk = __mmu_unsync_walk
) -> int:
    """Zap every unsync page below `parent`, an array at a time; return how many."""
    if pvec is None:
        pvec = kvm_mmu_pages()
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


# Why __mmu_unsync_walk() loses no page, with any array [and the check that asserts it]:
# 1. When a walk begins, each page that is unsync or has bits set has its own bit set in
#    all its parents: marking sees to that [expect_marked].  Until the walk ends, nobody
#    else marks or links, as the caller holds mmu_lock for write.
# 2. The walk clears a bit in four cases alone: behind it is no page; or one that is in
#    sync and has no bits; or one that is in the array; or one whose own walk is done,
#    which has left it no bits.  So 1 still holds, but for what is stored [the same].
# 3. If it does not return -ENOSPC, it has followed all bits.  By 1, these lead to every
#    unsync page below: all are stored.  Else the array is full of them [expect_kept].
# 4. The caller syncs or zaps all that is stored.  Then 1 holds without exception, and
#    fewer pages are unsync than before; in the end a walk finds none [Trace.hear].

# ========================================== the thread's walks, Linux's among them


def gathers_parents(walk: Callable[..., int]) -> Callable[..., int]:
    """Mark `walk` as one that stores parents; mmu_unsync_walk() stores the root."""
    walk.gathers_parents = True  # type: ignore[attr-defined]
    return walk


def does_gather(walk: Walk) -> bool:
    return getattr(walk, "gathers_parents", False)


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
    """`before`: the walk that 05/12 changes, and that Linux has (looked at: 7.2-rc)."""
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
    """Whether there is no room for a page.  (It was requested; it is not in Linux.)"""
    return pvec.nr >= pvec.capacity


@gathers_parents
def walk_check_first(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
    """`check-first`: what was requested at last, Ytl+Tn8YBQR3KQFM@google.com."""
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


# `linux` is the walk of `before` with callers that clear bits, which 04/12 takes away.
VARIANTS: dict[str, tuple[Walk, Caller]] = {
    "linux": (walk_before, linux_caller(kvm_sync_page)),
    "before": (walk_before, mmu_sync_children),
    "posted": (walk_posted, mmu_sync_children),
    "check-first": (walk_check_first, mmu_sync_children),
    "series-end": (walk_series_end, mmu_sync_children),
    "suggested": (__mmu_unsync_walk, mmu_sync_children),
}
WALKS = {label: walk for label, (walk, _) in VARIANTS.items()}

# ================================================================ building tables


def kvm_unsync_page(sp: kvm_mmu_page) -> None:
    """Make `sp`, of level 1, unsync and findable: the guest may write its table."""
    if sp.level > PG_LEVEL_4K:
        raise ValueError(f"only a page of level 1 can be unsync, not {sp!r}")
    sp.unsync = True
    tell("unsync", sp)
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


# ======================================================================= drawing


def ways(root: kvm_mmu_page) -> Counter[kvm_mmu_page]:
    """Return pages from `root` down, highest first, with the number of ways to each."""
    found = Counter({root: 1})
    queue = [root]
    for sp in queue:  # grows meanwhile: all pages of a level, then those of the next
        for ent in filter(None, sp.spt):  # a quick way past what is not present
            if isinstance(ent, kvm_mmu_page):
                if ent not in found:
                    queue.append(ent)
                found[ent] += found[sp]
    return found


def draw(*pages: kvm_mmu_page) -> str:
    """Return `pages` as ASCII trees: SPTE i is [i], or [i*] if its bit is set."""
    drawn: set[kvm_mmu_page] = set()
    return "\n".join(line for sp in pages for line in draw_tree(sp, drawn))


def draw_tree(sp: kvm_mmu_page, drawn: set[kvm_mmu_page]) -> list[str]:
    """Return the lines for `sp` and all below; pages already `drawn` are only named."""
    if sp in drawn:
        return [f"{sp!r}, as above"]
    drawn.add(sp)
    bits = set(for_each_set_bit(sp.unsync_child_bitmap))
    slots = sorted(bits.union(compress(range(SPTE_ENT_PER_PAGE), sp.spt)))
    lines = [repr(sp)]
    for i in slots:
        ent = sp.spt[i]
        is_page = isinstance(ent, kvm_mmu_page)
        below = draw_tree(ent, drawn) if is_page else [str(ent or "not present")]
        star = "*" if i in bits else ""
        fork, margin = ("`-", "  ") if i == slots[-1] else ("|-", "| ")
        lines.append(f"{fork}[{i}{star}] {below[0]}")
        lines += [margin + line for line in below[1:]]
    return lines


# ============================================================ what a walk promises


class Broken(BaseException):
    """A promise is broken.  This is no Exception, as a walk may catch those."""


def expect_marked(pages: Pages, stored: Pages) -> None:
    """Expect that bits lead to all that is unsync, but for what is `stored`."""
    for sp in pages:
        nr = f"{sp.unsync_child_bitmap:b}".count("1")
        if nr != sp.unsync_children:
            raise Broken(f"{sp} has {nr} bits set, but counts {sp.unsync_children}")
        # Marking stops at a page that has bits, so that its own bit must be set, too.
        if sp.unsync_children or (sp.unsync and sp not in stored):
            for parent, i in sp.parent_ptes:
                if not parent.unsync_child_bitmap >> i & 1:
                    raise Broken(f"{sp!r}, but its bit, [{i}] of {parent}, is clear")


def expect_kept(
    root: kvm_mmu_page, pvec: kvm_mmu_pages, ret: int, walk: Walk, waiting: Pages
) -> None:
    """Expect what `walk` promises of `ret` and `pvec`; other arrays hold `waiting`."""
    found = ways(root)
    unsync = {sp for sp in found if sp.unsync}
    due = unsync.difference(waiting)
    least, most = len(due), sum(found[sp] for sp in unsync)  # once for each way
    leaves = for_each_sp(pvec)
    error = ret == -ENOSPC
    used = f"{pvec.nr} of {pvec.capacity} entries used"
    for holds, otherwise in [
        (does_gather(walk) or leaves == pvec.sp, "needs @gathers_parents for parents"),
        (pvec.nr <= pvec.capacity, f"more is stored than fits: {used}"),
        (unsync >= set(leaves), "what is stored is in sync, or not below the root"),
        (len(set(leaves)) == len(leaves), "a page is stored twice"),
        (not error or pvec.nr == pvec.capacity, f"-ENOSPC returned with {used}"),
        (error or due <= set(leaves), f"{ret} returned, but not all is stored"),
        (error or least <= ret <= most, f"{ret} returned, not {least} to {most}"),
    ]:
        if not holds:
            raise Broken(otherwise)


def checked(walk: Walk, pages: Pages) -> Walk:
    """Return `walk`, made to raise Broken where it breaks a promise about `pages`."""
    arrays: set[kvm_mmu_pages] = set()  # all that it has filled

    @wraps(walk)  # also copies the mark of @gathers_parents
    def checked_walk(root: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
        bits = [sp.unsync_child_bitmap for sp in pages]
        rest = [(sp.unsync, sp.parent_ptes[:], sp.spt[:]) for sp in pages]
        capacity = pvec.capacity
        waiting = {sp for array in arrays for sp in array.sp}  # maybe not yet settled
        arrays.add(pvec)
        ret = walk(root, pvec)
        if type(ret) is not int:
            raise Broken(f"the walk returns {ret!r}, not an int")
        now = [(sp.unsync, sp.parent_ptes, sp.spt) for sp in pages]
        if (now, pvec.capacity) != (rest, capacity):
            raise Broken("the walk has changed more than bits and its array")
        if any(sp.unsync_child_bitmap & ~old for sp, old in zip(pages, bits)):
            raise Broken("the walk has set bits")
        expect_marked(pages, waiting.union(pvec.sp))
        expect_kept(root, pvec, ret, walk, waiting)
        return ret

    return checked_walk


# ======================================================================= telling

STEPS = {
    "unsync": "unsync {sp}: KVM maps its table writable",
    "mark": "  mark   [{detail}] of {sp}: {sp.unsync_children} set",
    "walk": "walk   {sp!r}",
    "look": "look   {sp!r}",
    "add": "add    {sp}: entry {detail.nr} of {detail.capacity}",
    "again": "again  {sp}: stored already",
    "refuse": "refuse {sp}: the array is full",
    "clear": "  clear  [{detail}] of {sp}: {sp.unsync_children} left",
    "return": "return {detail}",
    "sync": "sync   {sp!r}",
    "zap": "zap    {sp!r}",
}


class Trace:
    """What is done to `pages` from now on, told in words, a line a step."""

    def __init__(self, pages: Pages) -> None:
        roots = [sp for sp in pages if sp.spt and not sp.parent_ptes]
        self.before = draw(*roots).splitlines()  # what there is before the first step
        self.steps: list[str] = []
        self.broken = ""  # the promise that ended it, if one did
        self.misled = ""  # how a reader without mmu_lock was misled, if one was
        self.misled_at = 0  # the number of steps by then
        # Any page of these levels may be a root in use; for others KVM locks first.
        self.asked = [sp for sp in pages if sp.level >= PT64_ROOT_4LEVEL]
        self.walk_level = 0  # where the walk that runs has begun
        nr_links = sum(sp.unsync_children + len(sp.parent_ptes) for sp in pages)
        self.limit = 400 + nr_links**2  # of steps; a caller may be quadratic

    def follow(self, call: Callable[..., object], *args: object) -> None:
        """Call call(*args), and note what is told meanwhile, and how it ends."""
        listeners.append(self.hear)
        try:
            call(*args)
        except Broken as broken:
            self.broken = self.broken or str(broken)
        finally:
            listeners.remove(self.hear)

    def hear(self, what: str, sp: kvm_mmu_page, detail: object) -> None:
        """Put a step into words; then ask without the lock, as another vCPU may."""
        if what == "walk":
            self.walk_level = sp.level
        margin = "  " * max(0, self.walk_level - sp.level)
        if detail == -ENOSPC:
            detail = "-ENOSPC"
        self.steps.append(margin + STEPS[what].format(sp=sp, detail=detail))
        if what == "return":
            self.walk_level = 0
        if len(self.steps) > self.limit:
            raise Broken(f"it is not done after {self.limit} steps")
        # While KVM marks, the guest has not written yet: nobody is misled so far.
        if not self.misled and what not in ("unsync", "mark"):
            self.ask_without_lock()

    def ask_without_lock(self) -> None:
        """Note if is_unsync_root() is false of a root while a page below is unsync."""
        for root in self.asked:
            if is_unsync_root(root):
                continue
            for sp in ways(root):
                if sp.unsync:
                    self.misled = f"is_unsync_root({root}) is false, {sp} is unsync"
                    self.misled_at = len(self.steps)
                    self.steps[-1] += f"   <-- {self.misled}"
                    return


def narrate(
    root: kvm_mmu_page,
    pvec: kvm_mmu_pages,
    walk: Walk = __mmu_unsync_walk,
    caller: Caller = mmu_unsync_walk,
) -> str:
    """Walk once from `root`, or let `caller` deal with it; return a line a step."""
    pages = list(ways(root))
    trace = Trace(pages)
    trace.follow(caller, root, pvec, checked(walk, pages))
    trace.follow(expect_marked, pages, pvec.sp)  # also where it never walks
    failure = [f"FAILS: {trace.broken}"] if trace.broken else []
    return "\n".join(trace.steps + failure)


# ================================================================ tables to judge on


class Table(NamedTuple):
    """What a walk is tried on: pages that are linked, and the size of an array."""

    pages: list[kvm_mmu_page]  # the highest first
    capacity: int


def new_pages(level: int, nr: int) -> list[kvm_mmu_page]:
    """Return `nr` pages of `level`, named "page 2.0", "page 2.1" and so on."""
    return [kvm_mmu_page(level, name=f"page {level}.{n}") for n in range(nr)]


def fill(sp: kvm_mmu_page, index: int, ent: object) -> None:
    """Let SPTE `index` be `ent`, a page, "large" or "absent", and set its bit."""
    if isinstance(ent, kvm_mmu_page):
        link_shadow_page(sp, index, ent)
    elif ent == "large":
        set_large_spte(sp, index)
    mark_unsync(sp, index)


# What each SPTE of a small table may be: "nothing", or else its bit is set, too.
SMALL = {
    ("page 4.0", 7): ("page 3.0",),
    ("page 3.0", 0): ("page 2.0",),
    ("page 3.0", 511): ("nothing", "page 2.0", "page 2.1", "absent"),
    ("page 2.0", 0): ("page 1.0", "absent", "large"),
    ("page 2.0", 64): ("nothing", "page 1.0", "page 1.1"),
    ("page 2.1", 0): ("nothing", "page 1.0", "page 1.1"),
}


def small_tables() -> Iterator[Table]:
    """Yield all tables that SMALL allows, with two arrays, those of few SPTEs first."""
    choices = sorted(product(*SMALL.values()), key=lambda ents: -ents.count("nothing"))
    for ents, capacity in product(choices, (1, KVM_PAGE_ARRAY_NR)):
        pages = {str(sp): sp for level in (4, 3, 2, 1) for sp in new_pages(level, 2)}
        for (name, i), ent in zip(SMALL, ents):
            if ent != "nothing":
                fill(pages[name], i, pages.get(ent, ent))
        used = [sp for sp in pages.values() if sp.parent_ptes or sp.unsync_children]
        yield Table(used, capacity)


def random_tables() -> Iterator[Table]:
    """Yield a table for each height and size of array, where many pages are shared."""
    indexes = (0, 1, 62, 63, 64, 127, 128, 255, 256, 510, 511)  # borders of words
    heights_and_sizes = product((2, 3, 4, 5), (1, 2, 3, 4, 5, 8, 16, 40))
    for seed, (height, capacity) in enumerate(heights_and_sizes):
        rng = Random(seed)
        pages = below = new_pages(PG_LEVEL_4K, 9)
        for level in range(PG_LEVEL_2M, height + 1):
            ents = [*below, "absent", "large" if level <= PG_LEVEL_1G else "absent"]
            below = new_pages(level, 3)
            for sp in below:
                for i in rng.sample(indexes, rng.choice((1, 3, 6))):
                    fill(sp, i, rng.choice(ents))
            pages = below + pages
        yield Table(pages, capacity)


def wide_tables() -> Iterator[Table]:
    """Yield pages with more children than a word has bits, and mostly than fit."""
    for level, nr, capacity in (2, 130, 1), (2, 512, 600), (3, 70, 40), (4, 70, 16):
        root = kvm_mmu_page(level)
        for i in range(nr):
            shadow_page_at(root, i << (PAGE_SHIFT + SPTE_LEVEL_BITS * (level - 1)))
        pages = list(ways(root))
        if level > PG_LEVEL_2M:  # one leaf that all share, besides one for each
            shared = kvm_mmu_page(PG_LEVEL_4K)
            for sp in pages:
                if sp.level == PG_LEVEL_2M:
                    link_shadow_page(sp, 511, shared)
            pages.append(shared)
        yield Table(pages, capacity)


def tables() -> Iterator[Table]:
    """Return all tables that a walk is judged on, those first that are easily drawn."""
    return chain(small_tables(), random_tables(), wide_tables())


# ================================================================== judging a walk

NOT_KNOWN = "not known"  # because the walk or its caller fails


def guest_writes(pages: Pages) -> None:
    """Let KVM map all tables of level 1 writable, and the guest write them."""
    for sp in pages:
        if sp.level == PG_LEVEL_4K:
            kvm_unsync_page(sp)


def what_is_raised(error: BaseException) -> str:
    """Say what was raised, and where: the innermost line outside this file, if any."""
    frames = traceback.extract_tb(error.__traceback__)
    place = ([frame for frame in frames if frame.filename != __file__] or frames)[-1]
    name = pathlib.Path(place.filename).name
    return f"{type(error).__name__}: {error} ({name}, line {place.lineno})"


def call_and_check(
    caller: Caller, start: kvm_mmu_page, pvec: kvm_mmu_pages, walk: Walk, pages: Pages
) -> None:
    """Let `caller` deal with `start`; raise Broken unless all below it is settled."""
    try:
        caller(start, pvec, checked(walk, pages))
        expect_marked(pages, stored=())
    except (Broken, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise Broken(what_is_raised(error)) from error
    for sp in ways(start):
        if sp.unsync:
            raise Broken(f"the caller ends, but {sp} is unsync")


def traces(
    table: Table, walk: Walk, caller: Caller, array: type[kvm_mmu_pages]
) -> Iterator[Trace]:
    """Yield a trace of `caller` for each start page of a table, up to a broken one."""
    pages, capacity = table
    if does_gather(walk):
        capacity = max(capacity, pages[0].level)  # else mmu_unsync_walk() raises
    pvec = array(capacity)
    parents = [sp for sp in pages if sp.level > PG_LEVEL_4K]
    roots = [sp for sp in parents if not sp.parent_ptes]
    guest_writes(pages)
    # After the roots the six highest pages, the lowest first: some are in sync by then.
    for nr, start in enumerate([*roots, *reversed(parents[:6])], 1):
        trace = Trace(pages)
        trace.follow(call_and_check, caller, start, pvec, walk, pages)
        yield trace
        if trace.broken:
            return
        if nr <= len(roots):
            guest_writes(pages)


def first_faults(
    kind: Kind, walk: Walk, caller: Caller, array: type[kvm_mmu_pages]
) -> tuple[Trace, Trace]:
    """Return the first broken trace and the first misled one; if none, the last."""
    fault = misleading = Trace([])
    for table in kind():
        if fault.broken and (misleading.misled or len(table.pages) > 8):
            break  # one larger than the small ones takes long, and tells little more
        for trace in traces(table, walk, caller, array):
            fault = fault if fault.broken else trace  # so the first is kept
            misleading = misleading if misleading.misled else trace
    return fault, misleading


class Verdict(NamedTuple):
    """Three answers on a walk and its caller: "", or what is wrong, or NOT_KNOWN."""

    broken: str  # with KVM's array
    refused: str  # with an array that refuses a page when it is full
    misled: str  # with KVM's array, for a reader without mmu_lock
    cases: list[str]  # the first that show it, as texts

    @property
    def fine(self) -> bool:
        return not self.broken

    @property
    def lockless(self) -> bool:
        return not self.misled

    def __bool__(self) -> bool:
        return self.fine

    def __str__(self) -> str:
        lines = [
            f"FAILS: {self.broken}" if self.broken else "fine",
            f"if a full array refused: {self.refused or 'fine'}",
            f"a reader without mmu_lock: {self.misled or 'not misled'}",
        ]
        return "\n".join(lines + self.cases)


def judge(walk: Walk, caller: Caller = mmu_sync_children) -> Verdict:
    """Return how good `walk` and its `caller` are, tried on all tables()."""
    return judge_on(tables, walk, caller)


def judge_on(kind: Kind, walk: Walk, caller: Caller = mmu_sync_children) -> Verdict:
    """Return how good `walk` and its `caller` are on one kind of tables."""
    fault, misleading = first_faults(kind, walk, caller, kvm_mmu_pages)
    refusal, _ = first_faults(kind, walk, caller, RefusingPages)
    misled = misleading.misled
    cases = []
    if fault.broken:
        cases.append(show("With KVM's array", fault, len(fault.steps)))
        misled = misled or NOT_KNOWN
    if refusal.broken and refusal.broken != fault.broken:
        cases.append(show("If a full array refused", refusal, len(refusal.steps)))
    if misleading.misled:
        cases.append(show("A reader without a lock", misleading, misleading.misled_at))
    return Verdict(fault.broken, refusal.broken, misled, cases)


def show(heading: str, trace: Trace, nr_steps: int) -> str:
    """Return what was before a trace and `nr_steps` of it, in at most 30 lines."""
    lines = trace.before + trace.steps[:nr_steps]
    if len(lines) > 28:
        lines = [*lines[:12], f"... {len(lines) - 27} lines ...", *lines[-15:]]
    return "\n".join(["", f"{heading}:", *lines])


# ============================================================ the answer, the demo


def looks(root: kvm_mmu_page, walk: Walk, caller: Caller = mmu_sync_children) -> int:
    """Return how often `walk` looks at a child, until `caller` has settled `root`."""
    told: list[str] = []
    listeners.append(lambda what, sp, detail: told.append(what))
    try:
        caller(root, kvm_mmu_pages(), walk)
    finally:
        listeners.pop()
    return told.count("look")


def dense() -> kvm_mmu_page:
    """Return a root with 32 x 32 unsync pages, 32 below each of 32 of level 2."""
    root = kvm_mmu_page(PT64_ROOT_4LEVEL)
    for i, j in product(range(32), repeat=2):
        kvm_unsync_page(shadow_page_at(root, i << 30 | j << 21))
    return root


def answer_table() -> str:
    """Return how good VARIANTS are on the smallest tables, and how often they look."""
    head = "KVM's array  if a full array refused  reader without a lock  looks"
    rows = [f"{'':13}{head}"]
    for label, (walk, caller) in VARIANTS.items():
        verdict = judge_on(lambda: islice(small_tables(), 16), walk, caller)
        kvm = "FAILS" if verdict.broken else "fine"
        refusing = "FAILS" if verdict.refused else "fine"
        reader = nr_looks = NOT_KNOWN
        if verdict.fine:
            reader = "MISLED" if verdict.misled else "fine"
            nr_looks = f"{looks(dense(), walk, caller)}"
        rows.append(f"{label:13}{kvm:13}{refusing:25}{reader:23}{nr_looks:>5}")
    return "\n".join(rows)


def process() -> dict[str, kvm_mmu_page]:
    """Return the pages of a small process by name; "data" and "heap" are unsync."""
    root = kvm_mmu_page(PT64_ROOT_4LEVEL)
    for i in (3, 4):
        kvm_unsync_page(shadow_page_at(root, i << 21))
    pages = dict(zip(("root", "pud", "pmd", "data", "heap"), ways(root)))
    for name, sp in pages.items():
        sp.name = name
    return pages


def demo() -> str:
    """Return what `python unsync_walk.py` prints."""
    root = process()["root"]
    picture = draw(root)
    refused = narrate(process()["pmd"], RefusingPages(2), walk_posted)
    lost = "\n".join(refused.splitlines()[-4:])
    steps = narrate(root, kvm_mmu_pages())
    heard = is_unsync_root(root)
    kvm_mmu_sync_roots(root)  # vCPU B
    stale = " and ".join(sp.name for sp in ways(root) if sp.unsync)
    after_linux = process()["root"]
    mmu_unsync_walk(after_linux, kvm_mmu_pages(), walk_before)
    return f"""\
Patch 05/12 of 2022 lets KVM's unsync walk clear the bit of a page, and then add
the page to an array.  The review asks: is that wrong, if the add fails?

KVM maps two page tables of a guest writable; the guest may change them unseen.
Their shadow pages are unsync, and KVM sets bits on the way: [3*] is bit 3, set.
{picture}

05/12 walks from pmd alone, with an array of 2; it stores parents, so pmd, too:
{narrate(process()["pmd"], kvm_mmu_pages(2), walk_posted)}
The add cannot fail: it stores the page, and says "full" then.  So the walk ends
there, and [4] stays set for the next walk.  If a full array refused instead:
{lost}

vCPU A flushes its whole TLB, takes mmu_lock, and walks as the review says:
{steps}
Before A syncs, vCPU B flushes, same root.  As we read KVM, B asks without lock
if there is anything to sync: is_unsync_root() says {heard}.  B syncs nothing, and
may use old entries of {stale}.  (After Linux's walk: {is_unsync_root(after_linux)}.)

linux, before: the same walk, with Linux's callers, and with those of 04/12.
posted: 05/12.  series-end: 05/12 as it is at the end of its series.
check-first, suggested: what the reviewer asked for in the end, and at first.
{answer_table()}
FAILS: a page is lost.  MISLED: a vCPU skips its sync, as B does.  looks: how
often walks (not callers) look at a page, until 32 x 32 pages are synced."""


def main(argv: list[str]) -> None:
    """Print the demo, or with --walk the steps of one of VARIANTS."""
    import argparse

    parser = argparse.ArgumentParser(description="Show KVM's unsync walk.")
    parser.add_argument("--walk", choices=VARIANTS, help="tell the steps of this walk")
    label = parser.parse_args(argv).walk
    if label is None:
        print(demo())
    else:
        print(narrate(process()["root"], kvm_mmu_pages(), *VARIANTS[label]))


__all__ = [name for name in globals() if name[0] != "_"] + ["__mmu_unsync_walk"]

# ========================================================================== the tests

README = pathlib.Path(__file__).with_name("README.md")
HONEST = WALKS["suggested"]  # in a class, __mmu_unsync_walk would be mangled


class Tests(unittest.TestCase):
    def test_misuse(self) -> None:
        leaf, pmd, root = kvm_mmu_page(1), kvm_mmu_page(2), kvm_mmu_page(4)
        link_shadow_page(pmd, 7, leaf)
        set_large_spte(pmd, 8)
        full = kvm_mmu_pages(1)
        mmu_pages_add(full, leaf)
        before = draw(pmd, root)
        misuse: list[tuple[Any, ...]] = [
            (ValueError, kvm_mmu_page, 6),
            (ValueError, kvm_unsync_page, pmd),
            (ValueError, kvm_sync_page, leaf),
            (ValueError, mark_unsync, leaf, 0),
            (ValueError, clear_unsync_child_bit, pmd, 7),
            (ValueError, to_shadow_page, 0xBAD),
            (ValueError, link_shadow_page, root, 0, pmd),
            (ValueError, link_shadow_page, pmd, 7, kvm_mmu_page(1)),
            (ValueError, set_large_spte, root, 0),
            (ValueError, shadow_page_at, pmd, 1 << 30),
            (ValueError, shadow_page_at, pmd, 8 << 21),
            (ValueError, mmu_unsync_walk, pmd, full, walk_posted),
            (IndexError, link_shadow_page, pmd, -1, leaf),
            (IndexError, mark_unsync, pmd, 512),
            (TypeError, kvm_mmu_page, 1.5),
            (TypeError, shadow_page_at, root, 0.5),
            (OverflowError, mmu_pages_add, full, pmd),
        ]
        for error, function, *args in misuse:
            self.assertRaises(error, function, *args)
        self.assertEqual((draw(pmd, root), full.sp), (before, [leaf]))

    def test_promises(self) -> None:
        deeds: dict[str, Callable[..., object]] = {  # each done after a good walk
            "the walk returns '1', not an int": lambda sp, pvec, ret: str(ret),
            "-ENOSPC returned with 1 of 16": lambda sp, pvec, ret: -ENOSPC,
            "2 returned, not 1 to 1": lambda sp, pvec, ret: ret + 1,
            "changed more than bits": lambda sp, pvec, ret: kvm_sync_page(pvec.sp[0]),
            "the walk has set bits": lambda sp, pvec, ret: mark_unsync(sp, 8),
            "but counts 5": lambda sp, pvec, ret: setattr(sp, "unsync_children", 5),
            "needs @gathers_parents": lambda sp, pvec, ret: pvec.sp.append(sp),
            "17 of 16 entries": lambda sp, pvec, ret: pvec.sp.extend(pvec.sp * 16),
            "below the root": lambda sp, pvec, ret: pvec.sp.append(kvm_mmu_page(1)),
            "stored twice": lambda sp, pvec, ret: pvec.sp.append(pvec.sp[0]),
            "but its bit, [0] of page 2.0": lambda sp, pvec, ret: pvec.sp.clear(),
            "SystemExit: 3 (unsync_walk.py, line": lambda *_: sys.exit(3),
            "not done": lambda sp, pvec, ret: [to_shadow_page(sp) for _ in range(999)],
        }
        for sentence, deed in deeds.items():

            def walk(sp: kvm_mmu_page, pvec: kvm_mmu_pages, deed: Any = deed) -> Any:
                ret = HONEST(sp, pvec)
                return deed(sp, pvec, ret) or ret

            verdict = judge_on(lambda: islice(small_tables(), 1, 2), walk)
            self.assertIn(sentence, verdict.broken)
        self.assertEqual(len(verdict.cases[0].splitlines()), 30)  # of what is not done

    def test_tables(self) -> None:
        walks: list[Any] = [
            lru_cache(None)(HONEST),  # remembers what it returned
            lambda sp, pvec: min(HONEST(sp, pvec), 16),  # for wide_tables()
            lambda sp, pvec: 0 if sp.level == 5 else HONEST(sp, pvec),
            lambda sp, pvec: 0 if sp.parent_ptes else HONEST(sp, pvec),
            lambda sp, pvec: max(HONEST(sp, pvec), 0),  # hides -ENOSPC
        ]
        for walk in walks:
            self.assertFalse(judge(walk))

    def test_variants(self) -> None:
        for label, (walk, caller) in VARIANTS.items():
            verdict = judge_on(random_tables, walk, caller)
            self.assertTrue(verdict, label)
            self.assertEqual(bool(verdict.refused), label in ("posted", "series-end"))
            self.assertEqual(verdict.lockless, label in ("linux", "before"), label)

    def test_callers(self) -> None:
        def two_arrays(root: kvm_mmu_page, pvec: kvm_mmu_pages, walk: Walk) -> None:
            other = kvm_mmu_pages()
            while mmu_unsync_walk(root, pvec, walk):
                mmu_unsync_walk(root, other, walk)
                for sp in {*for_each_sp(pvec), *for_each_sp(other)}:
                    kvm_sync_page(sp)

        self.assertTrue(judge_on(random_tables, HONEST, two_arrays))
        self.assertTrue(judge_on(random_tables, HONEST, mmu_zap_unsync_children))
        verdict = judge_on(small_tables, HONEST, caller=lambda *_: None)
        self.assertIn("FAILS: the caller ends, but page 1.0 is unsync\n", str(verdict))
        self.assertEqual((verdict.refused, verdict.misled), (verdict.broken, NOT_KNOWN))
        with self.assertRaises(KeyboardInterrupt):
            judge(HONEST, caller=lambda *_: signal.default_int_handler(2, None))
        self.assertIn("not all is stored", judge_on(small_tables, lambda *_: 0).broken)
        pages = process()
        pages["root"].unsync_child_bitmap = pages["root"].unsync_children = 0
        told = narrate(pages["root"], kvm_mmu_pages(), caller=kvm_mmu_sync_roots)
        self.assertIn("FAILS: level 3, pud, unsync_children 1, but its bit, [0]", told)

    def test_pictures(self) -> None:
        refused, _ = judge_on(small_tables, walk_posted).cases
        self.assertIn("refused:\nlevel 4, page 4.0, unsync_children 1\n`-[7*]", refused)
        ents = {ent for t in random_tables() for sp in t.pages for ent in sp.spt}
        self.assertIn(LARGE_SPTE, ents)
        pages = process()
        link_shadow_page(pages["pud"], 9, pages["pmd"])
        self.assertRegex(draw(pages["pud"]), r"`-\[9\*\] .*pmd.*, as above")
        self.assertEqual(list(ways(pages["pud"]).values()), [1, 2, 2, 2])

    def test_demo(self) -> None:
        from unittest import mock

        with mock.patch.dict(VARIANTS, mine=(lambda *_: 0, mmu_sync_children)):
            self.assertRegex(answer_table(), "mine +FAILS +FAILS +not known +not")
        for answer in (True, False):
            with mock.patch(f"{__name__}.is_unsync_root", return_value=answer):
                self.assertIn(f"is_unsync_root() says {answer}", demo())
        text = demo()
        for lines in [
            "    |-[3*] level 1, data, unsync\n    `-[4*] level 1, heap, unsync\n\n",
            "\n  add    data: entry 2 of 2\nreturn -ENOSPC\nThe add cannot fail",
            "    clear  [0] of pud: 0 left\n  clear  [0] of root: 0 left   <-- is_",
            "may use old entries of data and heap.  (After Linux's walk: True.)",
        ]:
            self.assertIn(lines, text)
        self.assertLessEqual(max(map(len, text.splitlines())), 80)
        for argv, last in ([], "are synced."), (["--walk", "linux"], "return 0"):
            with redirect_stdout(io.StringIO()) as printed:
                main(argv)
            self.assertIn(last, printed.getvalue().splitlines()[-1])

    @unittest.skipUnless(README.exists(), "README.md is not here")
    def test_readme(self) -> None:
        import doctest  # slow to import, as is mock

        blocks = "(?s)```python\n(.*?)```.*?```text\n(.*?)```"
        ((code, output),) = re.findall(blocks, README.read_text())
        with redirect_stdout(io.StringIO()) as printed:
            exec(code, {})  # noqa: S102
        self.assertEqual(printed.getvalue(), output)
        self.assertEqual(doctest.testfile(str(README), module_relative=False).failed, 0)
        # Two conditions that look as good, and bits that are cleared by hand.
        walk, _, _ = code.partition("print")
        repair = "sp.level < PT64_ROOT_4LEVEL or not pvec.nr"
        clear = "clear_unsync_child_bit(sp, i)"
        by_hand = "sp.unsync_children -= 1; sp.unsync_child_bitmap &= ~(1 << i)"
        self.assertTrue(repair in walk and clear in walk)
        for condition, way, lockless in [
            (repair, by_hand, True),
            ("True", by_hand, False),
            ("sp.level < 5 or not pvec.nr", clear, False),
            ("sp.level < 4 or not ret", clear, False),
        ]:
            space: dict[str, Any] = {}
            exec(walk.replace(repair, condition).replace(clear, way), space)  # noqa: S102
            verdict = judge_on(random_tables, space["walk"])
            self.assertEqual((verdict.fine, verdict.lockless), (True, lockless))


if __name__ == "__main__":
    with suppress(AttributeError):  # where there is no SIGPIPE; this is for `| head`
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main(sys.argv[1:])
