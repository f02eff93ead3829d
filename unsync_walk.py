# SPDX-License-Identifier: GPL-2.0-only
r"""KVM's unsync walk as a model that runs, in one file, to be read beside its thread.

KVM shadows a guest's page tables with tables of its own, the shadow pages.  It lets the
guest write the lowest level of its tables freely, so the shadow pages of that level
drift: they are *unsync*.  When the guest flushes its TLB, KVM has to find every unsync
page below a root and bring it in line; if it misses one, the guest goes on using a
translation that it has just taken back.

The way to the unsync pages is marked.  Each shadow page has a bitmap with a bit for
each SPTE, and a set bit says: what this SPTE points at may be unsync, or lead there.

        root  level 3   unsync_child_bitmap {0, 7}
             /        \
        [0] /          \ [7]
         level 2 {4}    level 2 {4, 5}      shadow pages form a DAG:
             \          /    \              this level-1 page has two parents,
          [4] \    [4] /      \ [5]         and its bit is set in both
               level 1        level 1
               unsync         unsync

A walk follows the set bits and gathers the unsync pages in an array; its caller syncs
or zaps what is in the array, and walks again until nothing is left.  The array is
small, so a walk may have to break off.  In 2022 a patch proposed to clear the bits
during the walk, and its review asked in which order that is right:

    https://lore.kernel.org/r/YtcLiNskPb8z/2Qc@google.com

First come shadow pages, marking, the array, the walk and its callers, with the names
that they have in KVM (arch/x86/kvm/mmu/, Linux 5.19); set_large_spte() and
shadow_page_at(), which build tables, are the model's.  Where KVM would WARN, or write
past the end of its array, the model raises an exception, and changes nothing.  Below
stand the other walks of the thread, and what the model adds: a check of all walks on
every small table, what they cost, a demo and the tests.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from errno import ENOSPC
from itertools import chain, compress, product
from types import FrameType

__all__ = [
    "ABSENT", "ARRAYS", "CALLERS", "ENOSPC", "GATHERS_PARENTS", "KVM_PAGE_ARRAY_NR",
    "LARGE", "LARGE_SPTE", "PG_LEVEL_1G", "PG_LEVEL_2M", "PG_LEVEL_4K",
    "PT64_ROOT_MAX_LEVEL", "SPTE_ENT_PER_PAGE", "WALKS", "RefusingPages", "Table",
    "Verdict", "__mmu_unsync_walk", "check", "clear_unsync_child_bit", "cost",
    "cost_table", "costs", "draw", "for_each_set_bit", "for_each_sp", "honest_counts",
    "is_large_pte", "is_shadow_present_pte", "kvm_mmu_mark_parents_unsync",
    "kvm_mmu_page", "kvm_mmu_pages", "kvm_mmu_prepare_zap_page", "kvm_sync_page",
    "kvm_unsync_page", "link_shadow_page", "mark_unsync", "mmu_is_page_vec_full",
    "mmu_page_zap_pte", "mmu_pages_add", "mmu_sync_children", "mmu_unsync_walk",
    "mmu_zap_unsync_children", "narrate", "nothing_lost", "nothing_spurious",
    "nothing_unfindable", "set_large_spte", "shadow_page_at", "small_tables",
    "sync_carelessly", "to_shadow_page", "verdict_table", "walk_before",
    "walk_check_first", "walk_posted",
]

PG_LEVEL_4K = 1
PG_LEVEL_2M = 2
PG_LEVEL_1G = 3
PT64_ROOT_MAX_LEVEL = 5
PAGE_SHIFT = 12
# 5.19 still calls these two PT64_LEVEL_BITS and PT64_ENT_PER_PAGE.
SPTE_LEVEL_BITS = 9
SPTE_ENT_PER_PAGE = 1 << SPTE_LEVEL_BITS
KVM_PAGE_ARRAY_NR = 16


def _need_int(what: str, value: int, low: int, high: int) -> None:
    if type(value) is not int:
        raise TypeError(f"{what} must be an int, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{what} must be {low} to {high}, not {value}")


def _need_page(sp: object) -> None:
    if not isinstance(sp, kvm_mmu_page):
        raise TypeError(f"a kvm_mmu_page is needed, not {sp!r}")


def _need_spte(sp: object, index: int) -> None:
    _need_page(sp)
    if type(index) is not int:
        raise TypeError(f"the index of an SPTE must be an int, not {index!r}")
    if not 0 <= index < SPTE_ENT_PER_PAGE:
        raise IndexError(f"the index of an SPTE must be 0 to 511, not {index}")


# ------------------------------------------------------------------ shadow pages

# An SPTE (`ent` in the walk) is the shadow page that it points at, or LARGE_SPTE, or
# None where it is not present.
LARGE_SPTE = "large SPTE"


class _spt(dict[int, object]):
    """The SPTEs of a page by index; those that are not present take no room."""

    __slots__ = ()

    def __missing__(self, index: int) -> None:
        """Not present."""


# What the SPTEs of level 1 map is guest memory, which the model leaves out.
_NO_SPTES = _spt()


class kvm_mmu_page:
    """A shadow page of `level` 1 (`PG_LEVEL_4K`) to 5; `gfn` is a label here.

    `spt[i]` is SPTE i; `parent_ptes` lists the SPTEs that point here, as (page, index).
    Bit i of `unsync_child_bitmap` says that SPTE i may lead to an unsync page.  A set
    bit may be stale, a clear bit must be true.  `unsync_children` counts the set bits.
    Only a level-1 page can be `unsync` itself.  (struct kvm_mmu_page)

    Raises TypeError or ValueError for another level, or a gfn outside 0..2**52-1.

    >>> kvm_mmu_page(2, gfn=0x7f0)
    kvm_mmu_page(2, gfn=0x7f0)
    """

    __slots__ = (
        "gfn", "level", "parent_ptes", "spt", "unsync", "unsync_child_bitmap",
        "unsync_children",
    )

    def __init__(self, level: int, gfn: int = 0) -> None:
        _need_int("a level", level, PG_LEVEL_4K, PT64_ROOT_MAX_LEVEL)
        _need_int("a gfn", gfn, 0, (1 << 64 - PAGE_SHIFT) - 1)
        self.level = level
        self.gfn = gfn
        self.spt = _spt() if level > PG_LEVEL_4K else _NO_SPTES
        self.unsync = False
        self.unsync_children = 0
        self.unsync_child_bitmap = 0
        self.parent_ptes: list[tuple[kvm_mmu_page, int]] = []

    def __repr__(self) -> str:
        return f"kvm_mmu_page({self.level}, gfn={self.gfn:#x})"


def link_shadow_page(parent: kvm_mmu_page, index: int, child: kvm_mmu_page) -> None:
    """Let SPTE `index` (0..511) of `parent` point at `child`, one level below it.

    A large SPTE is replaced.  A child that is unsync, or has unsync children, marks its
    new parent: the bits that lead to it must be set on every path.

    Raises ValueError for a child of another level, or if there is a child already;
    TypeError or IndexError for what is not a page or an index.

    >>> root, leaf = kvm_mmu_page(2), kvm_mmu_page(1)
    >>> kvm_unsync_page(leaf)
    >>> link_shadow_page(root, 5, leaf)
    >>> root.unsync_child_bitmap == 1 << 5, leaf.parent_ptes
    (True, [(kvm_mmu_page(2, gfn=0x0), 5)])
    """
    _need_spte(parent, index)
    _need_page(child)
    if child.level != parent.level - 1:
        raise ValueError(
            f"a level-{parent.level} page links pages of level {parent.level - 1}, "
            f"not of level {child.level}"
        )
    ent = parent.spt[index]
    if is_shadow_present_pte(ent) and not is_large_pte(ent):
        raise ValueError(
            f"SPTE {index} of {parent} already points at {to_shadow_page(ent)}: "
            "zap it first with mmu_page_zap_pte()"
        )
    parent.spt[index] = child
    child.parent_ptes.append((parent, index))
    if child.unsync_children or child.unsync:
        mark_unsync(parent, index)


def set_large_spte(parent: kvm_mmu_page, index: int) -> None:
    """Turn SPTE `index` (0..511) of `parent` into a 2M or 1G leaf (level 2 or 3).

    A child that was there is unlinked.  Its bit stays as it is, so it may be stale from
    now on.  Raises ValueError for a parent of another level, TypeError or IndexError
    for what is not a page or an index.
    """
    _need_spte(parent, index)
    if not PG_LEVEL_2M <= parent.level <= PG_LEVEL_1G:
        raise ValueError(f"a large SPTE is of level 2 or 3, not {parent.level}")
    mmu_page_zap_pte(parent, index)
    parent.spt[index] = LARGE_SPTE


def mmu_page_zap_pte(parent: kvm_mmu_page, index: int) -> None:
    """Make SPTE `index` (0..511) of `parent` not present, and unlink a child there.

    The bit stays as it is: this is how a bit gets stale.  Raises TypeError or
    IndexError for what is not a page or an index.

    >>> root = kvm_mmu_page(2)
    >>> leaf = shadow_page_at(root, 0x1000)
    >>> kvm_unsync_page(leaf)
    >>> mmu_page_zap_pte(root, 0)
    >>> leaf.parent_ptes, root.unsync_child_bitmap, mmu_sync_children(root)
    ([], 1, 0)
    >>> root.unsync_child_bitmap, leaf.unsync
    (0, True)
    """
    _need_spte(parent, index)
    ent = parent.spt.pop(index, None)
    if is_shadow_present_pte(ent) and not is_large_pte(ent):
        to_shadow_page(ent).parent_ptes.remove((parent, index))


def shadow_page_at(root: kvm_mmu_page, gva: int) -> kvm_mmu_page:
    """Return the level-1 page below `root` that translates guest virtual address `gva`.

    Pages that are missing on the way are linked; their gfn labels the first address
    that they translate.  `gva` is in bytes, from 0 up: with 1 to 3 levels, of at most
    12 + 9 * level bits; with 4 or 5 levels, of 64 bits and canonical.

    Raises TypeError or ValueError for another address, ValueError for one that a large
    SPTE covers.

    >>> root = kvm_mmu_page(4)
    >>> stack = shadow_page_at(root, 0x7fff_ffff_e000)
    >>> stack, stack.parent_ptes
    (kvm_mmu_page(1, gfn=0x7fffffe00), [(kvm_mmu_page(2, gfn=0x7fffc0000), 511)])
    >>> stack is shadow_page_at(root, 0x7fff_fffd_d123)
    True
    """
    _need_page(root)
    if type(gva) is not int:
        raise TypeError(f"a guest virtual address must be an int, not {gva!r}")
    bits = PAGE_SHIFT + SPTE_LEVEL_BITS * root.level
    if root.level < 4:
        fits, rule = 0 <= gva < 1 << bits, f"addresses have {bits} bits"
    else:
        # The bits above must repeat the top bit: all clear or all set.
        fits = gva >> bits - 1 in (0, (1 << 65 - bits) - 1)
        rule = f"64-bit addresses are canonical in {bits} bits"
    if not fits:
        raise ValueError(f"with {root.level} levels {rule}: not so {gva:#x}")
    sp = root
    while sp.level > PG_LEVEL_4K:
        below = SPTE_LEVEL_BITS * (sp.level - 1)
        index = gva >> PAGE_SHIFT + below & SPTE_ENT_PER_PAGE - 1
        if is_large_pte(sp.spt[index]):
            raise ValueError(
                f"{gva:#x} is covered by the large SPTE {index} of {sp}: "
                "zap it first with mmu_page_zap_pte()"
            )
        if not is_shadow_present_pte(sp.spt[index]):
            gfn = gva >> PAGE_SHIFT + below << below
            link_shadow_page(sp, index, kvm_mmu_page(sp.level - 1, gfn))
        sp = to_shadow_page(sp.spt[index])
    return sp


def is_shadow_present_pte(ent: object) -> bool:
    """Whether an SPTE is present: large, or pointing at a shadow page."""
    return ent is not None


def is_large_pte(ent: object) -> bool:
    """Whether an SPTE is a large leaf, with no shadow page below it."""
    return ent is LARGE_SPTE


def to_shadow_page(ent: object) -> kvm_mmu_page:
    """Return the shadow page that an SPTE points at: each look at a child is a call.

    Raises TypeError for an SPTE that points at none.
    """
    if isinstance(ent, kvm_mmu_page):
        return ent
    raise TypeError(f"an SPTE that points at a kvm_mmu_page is needed, not {ent!r}")


# ----------------------------------------------------------------------- marking


def kvm_unsync_page(sp: kvm_mmu_page) -> None:
    """The guest may write the table that `sp` shadows: make it unsync, and findable.

    Raises TypeError for what is not a page, ValueError above level 1.

    A page that is shared is marked on every path, and each path only once:

    >>> left, right, leaf = kvm_mmu_page(2), kvm_mmu_page(2), kvm_mmu_page(1)
    >>> link_shadow_page(left, 3, leaf)
    >>> link_shadow_page(right, 8, leaf)
    >>> kvm_unsync_page(leaf)
    >>> kvm_unsync_page(leaf)
    >>> left.unsync_child_bitmap == 1 << 3, right.unsync_child_bitmap == 1 << 8
    (True, True)
    >>> left.unsync_children, right.unsync_children
    (1, 1)
    """
    _need_page(sp)
    if sp.level != PG_LEVEL_4K:
        raise ValueError(f"only a level-1 page can be unsync, not level {sp.level}")
    sp.unsync = True
    kvm_mmu_mark_parents_unsync(sp)


def kvm_mmu_mark_parents_unsync(sp: kvm_mmu_page) -> None:
    """Mark every SPTE that points at `sp`; raise TypeError for what is not a page."""
    _need_page(sp)
    for parent, index in sp.parent_ptes:
        mark_unsync(parent, index)


def mark_unsync(sp: kvm_mmu_page, index: int) -> None:
    """Set bit `index` (0..511) of `sp`, and mark the way from the roots to `sp`.

    There are two early stops: the bit was set already, or another one was; either way
    the ancestors know.  Raises ValueError at level 1, where SPTEs have no children,
    TypeError or IndexError for what is not a page or an index.
    """
    _need_spte(sp, index)
    if sp.level == PG_LEVEL_4K:
        raise ValueError(f"{sp} has no children: mark a page above level 1")
    if sp.unsync_child_bitmap & 1 << index:
        return
    sp.unsync_child_bitmap |= 1 << index
    sp.unsync_children += 1
    if sp.unsync_children > 1:
        return
    kvm_mmu_mark_parents_unsync(sp)


def clear_unsync_child_bit(sp: kvm_mmu_page, index: int) -> None:
    """Clear bit `index` (0..511) of `sp`, and of `sp` alone.

    Raises ValueError if it is clear (KVM counts down all the same, and WARNs below 0),
    TypeError or IndexError for what is not a page or an index.
    """
    _need_spte(sp, index)
    if not sp.unsync_child_bitmap & 1 << index:
        raise ValueError(f"bit {index} of {sp} is clear already: clear only a set bit")
    sp.unsync_children -= 1
    sp.unsync_child_bitmap ^= 1 << index


# --------------------------------------------------------------------- the array


class kvm_mmu_pages:
    """The array that a walk fills: `sp` holds the pages in order, `nr` says how many.

    KVM's has room for 16; a smaller `capacity` (1 or more) shows in small tables what
    KVM's does in large ones.  Raises TypeError or ValueError for another capacity.
    """

    __slots__ = ("capacity", "sp")

    def __init__(self, capacity: int = KVM_PAGE_ARRAY_NR) -> None:
        _need_int("a capacity", capacity, 1, sys.maxsize)
        self.capacity = capacity
        self.sp: list[kvm_mmu_page] = []

    @property
    def nr(self) -> int:
        """How many pages are in the array."""
        return len(self.sp)

    def store(self, sp: kvm_mmu_page) -> bool:
        """Store `sp`, and then say whether the array is now full, as KVM does.

        Raises OverflowError if it was full before: KVM would write past its end.
        """
        if mmu_is_page_vec_full(self):
            raise OverflowError(
                f"the array holds {self.capacity} pages already: after an add that "
                "returned true, the walk must return -ENOSPC"
            )
        self.sp.append(sp)
        return mmu_is_page_vec_full(self)


def mmu_is_page_vec_full(pvec: kvm_mmu_pages) -> bool:
    """Whether the array is full: the next add would go past its end.

    5.19 has no such function; Ytl+Tn8YBQR3KQFM@google.com suggests it.
    """
    return pvec.nr == pvec.capacity


def _need_array(pvec: object) -> None:
    if not isinstance(pvec, kvm_mmu_pages):
        raise TypeError(f"a kvm_mmu_pages is needed, not {pvec!r}")


def mmu_pages_add(pvec: kvm_mmu_pages, sp: kvm_mmu_page) -> bool:
    """Store `sp`, unless it is unsync and there already; return true if that filled up.

    True does not say that `sp` was left out, as the review reads it
    (YtcLiNskPb8z/2Qc@google.com).  It says that the array is full now, and that the
    next page would not fit: the answer in
    CAJhGHyAoM+6cOh7XQUvavgJcUts53FW6BnjM_wqMD6fkoYoB3w@mail.gmail.com.

    Raises OverflowError if the array was full before, TypeError for another type.

    >>> pvec = kvm_mmu_pages(capacity=2)
    >>> first, second = kvm_mmu_page(1), kvm_mmu_page(1)
    >>> kvm_unsync_page(first)
    >>> mmu_pages_add(pvec, first), mmu_pages_add(pvec, first), pvec.nr
    (False, False, 1)
    >>> mmu_pages_add(pvec, second), pvec.sp[1] is second
    (True, True)
    """
    _need_array(pvec)
    _need_page(sp)
    if sp.unsync and sp in pvec.sp:
        return False
    return pvec.store(sp)


# ---------------------------------------------------------------------- the walk


def for_each_set_bit(bitmap: int) -> Iterator[int]:
    """Yield the indexes of the set bits of `bitmap` (0 or more), rising.

    KVM's macro reads the bitmap as it goes, this one its value at the start.  It comes
    to the same: a walk clears no other bit of its page than the one that it is at.

    >>> list(for_each_set_bit(0b1001 | 1 << 511))
    [0, 3, 511]
    """
    if bitmap < 0:
        raise ValueError(f"a bitmap must be 0 or more, not {bitmap}")
    while bitmap:
        lowest = bitmap & -bitmap
        yield lowest.bit_length() - 1
        bitmap ^= lowest


Walk = Callable[[kvm_mmu_page, kvm_mmu_pages], int]

# The contract of the walk: before mmu_lock is dropped, the caller must sync or zap all
# that is in the array, also when the walk has returned -ENOSPC.  This alone makes it
# right to clear a bit once the page is added: the array is then all that knows of it.
# The caller cannot fail: a page whose sync fails is zapped.


def __mmu_unsync_walk(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
    """Add the unsync pages below `sp` to `pvec`, and clear the bits that led to them.

    This is the reference, as the review suggests it in YtcLiNskPb8z/2Qc@google.com;
    there, as at the end of the series, it is called __mmu_unsync_walk_and_clear().

    Returns how often it came upon an unsync page, once for each bit that leads there,
    or -ENOSPC if the array filled up.  Then every bit on the way to where it broke off
    is still set, that of the last page added too.

    Both pages fit; the array is not full yet:

    >>> root = kvm_mmu_page(3)
    >>> for gva in 0x1000, 0x200000:
    ...     kvm_unsync_page(shadow_page_at(root, gva))
    >>> pvec = kvm_mmu_pages(capacity=3)
    >>> mmu_unsync_walk(root, pvec), pvec.sp, root.unsync_children
    (2, [kvm_mmu_page(1, gfn=0x0), kvm_mmu_page(1, gfn=0x200)], 0)

    The second page fills the array.  The walk breaks off, and leaves two bits that are
    stale once the caller has synced both pages; the next walk clears them:

    >>> for page in pvec.sp:
    ...     kvm_unsync_page(page)
    >>> pvec = kvm_mmu_pages(capacity=2)
    >>> mmu_unsync_walk(root, pvec) == -ENOSPC, pvec.nr
    (True, 2)
    >>> middle = to_shadow_page(root.spt[0])
    >>> bin(root.unsync_child_bitmap), bin(middle.unsync_child_bitmap)
    ('0b1', '0b10')
    >>> for page in pvec.sp:
    ...     kvm_sync_page(page)
    >>> mmu_unsync_walk(root, pvec), pvec.nr, root.unsync_children
    (0, 0, 0)
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

        # Either the bit was stale, or the caller makes it so: see the contract.
        clear_unsync_child_bit(sp, i)

    return nr_unsync_leaf


def mmu_unsync_walk(
    sp: kvm_mmu_page, pvec: kvm_mmu_pages, walk: Walk = __mmu_unsync_walk
) -> int:
    """Empty `pvec` and fill it with unsync pages from below `sp`.

    Returns 0 if there are none, else what `walk` returns: how often it came upon one,
    or -ENOSPC.  A walk in GATHERS_PARENTS finds `sp` itself stored first, as in KVM.

    Raises ValueError if such a walk gets an array of fewer entries than the level of
    `sp`: parents alone would fill it, and the callers would never end.  Raises
    TypeError for what is not a page, an array or a walk.
    """
    _need_page(sp)
    _need_array(pvec)
    if not callable(walk):
        raise TypeError(f"a walk must be a function, not {walk!r}")
    if walk in GATHERS_PARENTS and pvec.capacity < sp.level:
        raise ValueError(
            f"a walk that gathers parents needs an array of at least {sp.level} "
            f"entries below a level-{sp.level} page, not {pvec.capacity}"
        )
    pvec.sp.clear()
    if not sp.unsync_children:
        return 0
    if walk in GATHERS_PARENTS:
        mmu_pages_add(pvec, sp)
    return walk(sp, pvec)


# ------------------------------------------------------------------- the callers


def kvm_sync_page(sp: kvm_mmu_page) -> None:
    """Bring `sp` in line with the guest's table: from now on it is not unsync.

    Raises ValueError if it was not unsync, where KVM's kvm_unlink_unsync_page() WARNs,
    and TypeError for what is not a page.
    """
    _need_page(sp)
    if not sp.unsync:
        raise ValueError(f"{sp} is in sync: sync only a page that is unsync")
    sp.unsync = False


def kvm_mmu_prepare_zap_page(sp: kvm_mmu_page) -> None:
    """Zap the unsync pages below `sp`, then take `sp` out of the table.

    All its children are unlinked, and all its parents; the bits there stay, stale.
    Raises TypeError for what is not a page.

    >>> root = kvm_mmu_page(3)
    >>> leaf = shadow_page_at(root, 0)
    >>> kvm_unsync_page(leaf)
    >>> middle = to_shadow_page(root.spt[0])
    >>> kvm_mmu_prepare_zap_page(middle)
    >>> leaf.unsync, leaf.parent_ptes, middle.unsync_child_bitmap, middle.parent_ptes
    (False, [], 0, [])
    >>> is_shadow_present_pte(root.spt[0]), root.unsync_child_bitmap
    (False, 1)
    """
    mmu_zap_unsync_children(sp)
    for index in list(sp.spt):
        mmu_page_zap_pte(sp, index)
    for parent, index in list(sp.parent_ptes):
        mmu_page_zap_pte(parent, index)
    sp.unsync = False


def for_each_sp(pvec: kvm_mmu_pages) -> Iterator[kvm_mmu_page]:
    """Yield the level-1 pages of `pvec`, and pass over parents that a walk gathered."""
    for sp in pvec.sp:
        if sp.level == PG_LEVEL_4K:
            yield sp


def mmu_sync_children(
    parent: kvm_mmu_page,
    pvec: kvm_mmu_pages | None = None,
    walk: Walk = __mmu_unsync_walk,
) -> int:
    """Sync every unsync page below `parent`, an array at a time; return how many.

    `pvec` is the array to use, by default a fresh one of 16; `walk` is the walk.
    Raises what mmu_unsync_walk() raises.  (KVM's function returns a status.)

    >>> root = kvm_mmu_page(4)
    >>> for gva in range(0, 40 << 21, 1 << 21):
    ...     kvm_unsync_page(shadow_page_at(root, gva))
    >>> mmu_sync_children(root), root.unsync_children
    (40, 0)
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
    """Zap every unsync page below `parent`, an array at a time; return how many.

    `pvec` is the array to use, by default a fresh one of 16; `walk` is the walk.
    Raises what mmu_unsync_walk() raises.

    >>> root = kvm_mmu_page(2)
    >>> kvm_unsync_page(shadow_page_at(root, 0))
    >>> mmu_zap_unsync_children(root), root.spt, root.unsync_children
    (1, {}, 0)
    """
    pvec = kvm_mmu_pages() if pvec is None else pvec
    zapped = 0
    while mmu_unsync_walk(parent, pvec, walk):
        for sp in for_each_sp(pvec):
            kvm_mmu_prepare_zap_page(sp)
            zapped += 1
    return zapped


# ================================================== the other walks of the thread
# From here on names are the model's: KVM has one walk at a time.  These take and return
# what the reference does; they gather parents too, and clear a bit at other times.


def walk_before(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
    """`before`: the walk that 05/12 was written for, after 04/12.

    A bit is cleared only if there is nothing behind it.  That of a page which the
    caller is about to sync is left to the next walk.
    """
    nr_unsync_leaf = 0

    for i in for_each_set_bit(sp.unsync_child_bitmap):
        ent = sp.spt[i]

        if not is_shadow_present_pte(ent) or is_large_pte(ent):
            clear_unsync_child_bit(sp, i)
            continue
        child = to_shadow_page(ent)

        if child.unsync_children:
            if mmu_pages_add(pvec, child):
                return -ENOSPC
            ret = walk_before(child, pvec)
            if ret < 0:
                return ret
            if ret == 0:
                clear_unsync_child_bit(sp, i)
            nr_unsync_leaf += ret
        elif child.unsync:
            # No clear here: this is what 05/12 is about.
            nr_unsync_leaf += 1
            if mmu_pages_add(pvec, child):
                return -ENOSPC
        else:
            clear_unsync_child_bit(sp, i)

    return nr_unsync_leaf


def walk_posted(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
    """`posted`: 05/12 as it was posted, 20220605064342.309219-6-jiangshanlai@gmail.com.

    The bit is cleared *before* an unsync child is added.
    """
    nr_unsync_leaf = 0

    for i in for_each_set_bit(sp.unsync_child_bitmap):
        ent = sp.spt[i]

        if not is_shadow_present_pte(ent) or is_large_pte(ent):
            clear_unsync_child_bit(sp, i)
            continue
        child = to_shadow_page(ent)

        if child.unsync_children:
            if mmu_pages_add(pvec, child):
                return -ENOSPC
            ret = walk_posted(child, pvec)
            if ret < 0:
                return ret
            nr_unsync_leaf += ret

        # Clear, then add: the order that the review asks about.
        clear_unsync_child_bit(sp, i)
        if child.unsync:
            nr_unsync_leaf += 1
            if mmu_pages_add(pvec, child):
                return -ENOSPC

    return nr_unsync_leaf


def walk_check_first(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
    """`check-first`: the resolution, Ytl+Tn8YBQR3KQFM@google.com.

    It asks whether the array is full before it adds, and only at a page that is unsync
    or may lead to one; what the add returns no longer matters.
    """
    nr_unsync_leaf = 0

    for i in for_each_set_bit(sp.unsync_child_bitmap):
        ent = sp.spt[i]

        if is_shadow_present_pte(ent) and not is_large_pte(ent):
            child = to_shadow_page(ent)

            # Ask, then add: the add itself can no longer be misread.
            if child.unsync_children or child.unsync:
                if mmu_is_page_vec_full(pvec):
                    return -ENOSPC
                mmu_pages_add(pvec, child)

            if child.unsync_children:
                ret = walk_check_first(child, pvec)
                if ret < 0:
                    return ret
                nr_unsync_leaf += ret
            elif child.unsync:
                nr_unsync_leaf += 1

        clear_unsync_child_bit(sp, i)

    return nr_unsync_leaf


WALKS: dict[str, Walk] = {
    "before": walk_before,
    "posted": walk_posted,
    "suggested": __mmu_unsync_walk,
    "check-first": walk_check_first,
}

# These store a child that has unsync children too, as KVM does for the sake of
# struct mmu_page_path; add a walk of your own if it does.
GATHERS_PARENTS: set[Walk] = {walk_before, walk_posted, walk_check_first}


class RefusingPages(kvm_mmu_pages):
    """The array as the review reads it: an add when it is full stores nothing, says so.

    >>> pvec = RefusingPages(capacity=1)
    >>> mmu_pages_add(pvec, kvm_mmu_page(1)), mmu_pages_add(pvec, kvm_mmu_page(1))
    (False, True)
    >>> pvec.nr
    1
    """

    __slots__ = ()

    def store(self, sp: kvm_mmu_page) -> bool:
        """Store `sp` and return false; or return true if there is no room for it."""
        if mmu_is_page_vec_full(self):
            return True
        self.sp.append(sp)
        return False


# ===================================================================== the check
# Every small table, with every walk, array and caller: what breaks, and where first?

# What an SPTE holds in the rows of a Table, if not the number of a page.
ABSENT, LARGE = -1, -2
Row = tuple[int, ...]


class Table:
    """A small table, whose pages are numbered: roots first, level 1 last.

    `levels` has the level of each page; `rows` has, for each page above level 1, what
    its SPTEs hold: the number of a page, ABSENT or LARGE; `unsync` has the numbers of
    the unsync pages.  Page 0 is the root to sync.

    >>> table = Table(levels=(2, 1, 1), rows=((1, ABSENT, LARGE, 2),), unsync=(2,))
    >>> print(table)
    level 2, page 0, unsync_children 4
    |-[0*] level 1, page 1, in sync
    |-[1*] not present
    |-[2*] large
    `-[3*] level 1, page 2, unsync
    >>> table.size
    (2, 3)

    Every SPTE has its bit set, and where nothing below is unsync the bit is stale.
    SPTEs with a clear bit are left out: a walk that goes down by the bits does not look
    at them, and what is below is in sync.  So for such a walk these are all the states
    that `nothing_unfindable` allows, whatever the history that led there.
    """

    def __init__(
        self, levels: tuple[int, ...], rows: tuple[Row, ...], unsync: tuple[int, ...]
    ) -> None:
        self.levels, self.rows, self.unsync = levels, rows, unsync

    @property
    def size(self) -> tuple[int, int]:
        """The number of links and the number of pages."""
        ents = list(chain(*self.rows))
        return len(ents) - ents.count(ABSENT) - ents.count(LARGE), len(self.levels)

    def build(self) -> list[kvm_mmu_page]:
        """Return the table as new pages, in the order of their numbers."""
        pages = [kvm_mmu_page(level) for level in self.levels]
        for sp, row in zip(pages, self.rows):
            for i, ent in enumerate(row):
                if ent == LARGE:
                    set_large_spte(sp, i)
                elif ent != ABSENT:
                    link_shadow_page(sp, i, pages[ent])
                mark_unsync(sp, i)
        for number in self.unsync:
            kvm_unsync_page(pages[number])
        return pages

    def __str__(self) -> str:
        pages = self.build()
        names = {sp: f"page {number}" for number, sp in enumerate(pages)}
        roots = [sp for sp in pages if not sp.parent_ptes]
        return "\n".join(line for root in roots for line in draw(root, names))


def small_tables(sptes: int) -> Iterator[Table]:
    """Yield every table of up to `sptes` SPTEs, below a root of level 2, 3 or 4.

    There may be a second root, of the same level, that shares pages with the first.
    Tables that differ by naming are one table.  Pages are numbered as they come up;
    where no walk from page 0 comes by, the order of SPTEs is a matter of naming, and so
    are leaves that the second root alone leads to.  (From 5 SPTEs on, a few tables come
    twice, where the second root has two middle pages to itself.)

    >>> for table in small_tables(1):
    ...     print(table.levels, table.rows, table.unsync)
    (2, 1) ((1,),) ()
    (2, 1) ((1,),) (1,)
    (2,) ((-1,),) ()
    (2,) ((-2,),) ()
    (3, 2) ((1,), ()) ()
    (3,) ((-1,),) ()
    (3,) ((-2,),) ()
    (4, 3) ((1,), ()) ()
    (4,) ((-1,),) ()
    """
    _need_int("a bound", sptes, 1, sys.maxsize)
    for size, level, roots in product(range(1, sptes + 1), (2, 3, 4), (1, 2)):
        seen = set()
        for levels, rows, walked in _grown((level,) * roots, ((),), {0}, size):
            others = [row for page, row in enumerate(rows) if page not in walked]
            if not rows[0] or others and walked.isdisjoint(chain(*others)):
                continue
            leaves = range(len(rows), len(levels))
            own = {
                leaf: [row.count(leaf) for row in others]
                for leaf in leaves
                if leaf not in walked
            }
            named = [[ent for ent in row if ent not in own] for row in rows]
            for chosen in product((False, True), repeat=len(leaves)):
                unsync = tuple(compress(leaves, chosen))
                unnamed = sorted((leaf in unsync, own[leaf]) for leaf in own)
                key = repr((levels, named, walked & {*unsync}, unnamed))
                if key not in seen:
                    seen.add(key)
                    yield Table(levels, rows, unsync)


def _grown(
    levels: tuple[int, ...], rows: tuple[Row, ...], walked: set[int], room: int
) -> Iterator[tuple[tuple[int, ...], tuple[Row, ...], set[int]]]:
    """Yield what `room` more SPTEs make of a table whose last row may still grow.

    `walked` are the pages that a walk from page 0 can come to.
    """
    page, row, new = len(rows) - 1, rows[-1], len(levels)
    if page + 1 < new and levels[page + 1] > PG_LEVEL_4K:
        yield from _grown(levels, (*rows, ()), walked, room)
    elif not room:
        yield levels, rows, walked
    if room:
        below = levels[page] - 1
        ents = [number for number in range(new) if levels[number] == below] + [new]
        if page not in walked:
            ents = [ent for ent in ents if row[-1:] <= (ent,)]
        elif levels[page] > PG_LEVEL_1G:
            ents += [ABSENT]
        else:
            ents += [ABSENT, LARGE]
        for ent in ents:
            yield from _grown(
                (*levels, below) if ent == new else levels,
                (*rows[:-1], (*row, ent)),
                walked | {ent} if page in walked else walked,
                room - 1,
            )


# The properties.


def nothing_lost(root: kvm_mmu_page) -> bool:
    """No unsync page can be reached from the root that was synced, bits or no bits."""
    for ent in root.spt.values():
        if not is_large_pte(ent) and not nothing_lost(to_shadow_page(ent)):
            return False
    return not root.unsync


def nothing_unfindable(pages: list[kvm_mmu_page]) -> bool:
    """What is unsync, or has unsync children, has its bit set in every parent.

    This must hold whenever mmu_lock is free, and so between two walks too.
    """
    for sp in pages:
        if sp.unsync or sp.unsync_children:
            for parent, index in sp.parent_ptes:
                if not parent.unsync_child_bitmap & 1 << index:
                    return False
    return True


def honest_counts(pages: list[kvm_mmu_page]) -> bool:
    """`unsync_children` is the number of set bits.

    >>> def miscounting(sp, pvec):
    ...     ret = WALKS["suggested"](sp, pvec)
    ...     sp.unsync_children += 1
    ...     return ret
    >>> print(check(1, {"miscounting": miscounting})["miscounting", "KVM's", "sync"])
    9 tables: fine 0, lost 0, spin 0, else 9
    "honest counts" fails first with an array of 1, on
    level 2, page 0, unsync_children 1
    `-[0*] not present
    """
    for sp in pages:
        if sp.unsync_children != f"{sp.unsync_child_bitmap:b}".count("1"):
            return False
    return True


def nothing_spurious(batch: list[kvm_mmu_page]) -> bool:
    """In an array that a walk filled, each level-1 page stands once, and is unsync.

    >>> def repeating(sp, pvec):
    ...     ret = WALKS["suggested"](sp, pvec)
    ...     pvec.sp *= 2
    ...     return ret
    >>> print(check(1, {"repeating": repeating})["repeating", "KVM's", "sync"])
    9 tables: fine 8, lost 0, spin 0, else 1
    "nothing spurious" fails first with an array of 1, on
    level 2, page 0, unsync_children 1
    `-[0*] level 1, page 1, unsync

    >>> def hoarding(sp, pvec):
    ...     return 1 + mmu_pages_add(pvec, kvm_mmu_page(1))
    >>> [*check(1, {"hoarding": hoarding})["hoarding", "KVM's", "zap"].smallest]
    ['nothing spurious']
    """
    for sp in batch:
        if not sp.unsync:
            return False
    return len(set(batch)) == len(batch)


def sync_carelessly(parent: kvm_mmu_page, pvec: kvm_mmu_pages, walk: Walk) -> None:
    """Break the contract: drop what is in the array after -ENOSPC, and walk again."""
    while ret := mmu_unsync_walk(parent, pvec, walk):
        if ret != -ENOSPC:
            for sp in for_each_sp(pvec):
                kvm_sync_page(sp)


ARRAYS = {"KVM's": kvm_mmu_pages, "refusing": RefusingPages}
Caller = Callable[[kvm_mmu_page, kvm_mmu_pages, Walk], object]
CALLERS: dict[str, Caller] = {
    "sync": mmu_sync_children,
    "zap": mmu_zap_unsync_children,
    "careless": sync_carelessly,
}


class Broken(Exception):
    """A property that breaks while a caller is still looping."""


def broken_by(
    pages: list[kvm_mmu_page], caller: Caller, pvec: kvm_mmu_pages, walk: Walk
) -> tuple[set[str], bool]:
    """Let `caller` loop on `pages[0]`: which properties break, and did `pvec` fill up?

    A state that comes back before a walk will do so for ever: then it never ends.  What
    KVM would WARN of, or write past its array, breaks a property, too.
    """
    broken: set[str] = set()
    states: list[list[tuple[bool, int]]] = []
    filled = False

    def observed(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
        nonlocal filled
        if states and not nothing_unfindable(pages):
            broken.add("nothing unfindable")
        state = [(page.unsync, page.unsync_child_bitmap) for page in pages]
        if state in states:
            raise Broken("it ends")
        states.append(state)
        ret = walk(sp, pvec)
        filled = filled or ret == -ENOSPC or mmu_is_page_vec_full(pvec)
        if not nothing_spurious(list(for_each_sp(pvec))):
            raise Broken("nothing spurious")
        return ret

    if walk in GATHERS_PARENTS:
        GATHERS_PARENTS.add(observed)
    try:
        caller(pages[0], pvec, observed)
    except Broken as error:
        broken.add(str(error))
    except (IndexError, OverflowError, ValueError) as error:
        broken.add(f"no {type(error).__name__}")
    else:
        holds = {
            "nothing lost": nothing_lost(pages[0]),
            "nothing unfindable": nothing_unfindable(pages),
            "honest counts": honest_counts(pages),
        }
        broken.update(name for name in holds if not holds[name])
    finally:
        GATHERS_PARENTS.discard(observed)
    return broken, filled or mmu_is_page_vec_full(pvec)


class Verdict:
    """What the tables came to, with one walk, array and caller.

    `counts` has on how many tables a page was "lost", at whatever capacity; on how many
    others the loop would "spin" for ever; on how many others something "else" broke;
    and how many were "fine".  `smallest` has by property the smallest case that breaks
    it: (links, pages, capacity), and the table.
    """

    def __init__(self) -> None:
        self.counts = {"fine": 0, "lost": 0, "spin": 0, "else": 0}
        self.smallest: dict[str, tuple[tuple[int, int, int], Table]] = {}

    def count(self, table: Table, broken: dict[str, int]) -> None:
        """Take in a table: `broken` says at which capacity a property broke first."""
        if "nothing lost" in broken:
            self.counts["lost"] += 1
        elif "it ends" in broken:
            self.counts["spin"] += 1
        else:
            self.counts["else" if broken else "fine"] += 1
        for name in sorted(broken):
            size = (*table.size, broken[name])
            if name not in self.smallest or size < self.smallest[name][0]:
                self.smallest[name] = size, table

    def __str__(self) -> str:
        counts = ", ".join(f"{what} {count}" for what, count in self.counts.items())
        lines = [f"{sum(self.counts.values())} tables: {counts}"]
        for name, ((_, _, capacity), table) in sorted(self.smallest.items()):
            lines.append(f'"{name}" fails first with an array of {capacity}, on')
            lines.append(str(table))
        return "\n".join(lines)


Verdicts = dict[tuple[str, str, str], Verdict]


def become(sp: kvm_mmu_page, other: kvm_mmu_page) -> None:
    """Give `sp` a copy of all that `other` has: this undoes what a run did to it."""
    sp.unsync, sp.unsync_children = other.unsync, other.unsync_children
    sp.unsync_child_bitmap = other.unsync_child_bitmap
    sp.spt, sp.parent_ptes = _spt(other.spt), list(other.parent_ptes)


def check(sptes: int = 4, walks: dict[str, Walk] = WALKS) -> Verdicts:
    """Judge `walks`, by label, on every table of up to `sptes` SPTEs.

    Each walk runs with each of ARRAYS and each of CALLERS, at every capacity from the
    smallest legal one until nothing returns -ENOSPC.  The verdicts are by (walk, array,
    caller).  Progress goes to stderr if that is a terminal; each SPTE more takes about
    ten times as long.

    Raises TypeError or ValueError if `sptes` is not an int from 1 up.  An IndexError,
    OverflowError or ValueError of a walk is in its verdict; any other comes through.

    >>> print(check(2)["posted", "refusing", "zap"])
    53 tables: fine 52, lost 1, spin 0, else 0
    "nothing lost" fails first with an array of 2, on
    level 2, page 0, unsync_children 2
    |-[0*] level 1, page 1, unsync
    `-[1*] level 1, page 2, unsync
    "nothing unfindable" fails first with an array of 2, on
    level 2, page 0, unsync_children 2
    |-[0*] level 1, page 1, unsync
    `-[1*] level 1, page 2, unsync
    """
    verdicts = {key: Verdict() for key in product(walks, ARRAYS, CALLERS)}
    tables = list(small_tables(sptes))
    for number, table in enumerate(tables):
        if number % 500 == 499 and sys.stderr.isatty():
            print(f"{number + 1} of {len(tables)} tables", file=sys.stderr)
        pages = table.build()
        before = [kvm_mmu_page(sp.level) for sp in pages]
        for sp, copy in zip(pages, before):
            become(copy, sp)
        # An array that does not fill up is the same in both readings, and its caller has
        # nothing to be careless about: what breaks is known without another run.
        known: dict[tuple[str, bool, int], set[str]] = {}
        for (label, array, caller), verdict in verdicts.items():
            walk = walks[label]
            least = pages[0].level if walk in GATHERS_PARENTS else 1
            broken: dict[str, int] = {}
            # The end is for a walk that would find any array too small.
            for capacity in range(least, sptes * sptes + PT64_ROOT_MAX_LEVEL):
                key = label, caller == "zap", capacity
                if key in known:
                    names, filled = known[key], False
                else:
                    pvec = ARRAYS[array](capacity)
                    names, filled = broken_by(pages, CALLERS[caller], pvec, walk)
                    for sp, copy in zip(pages, before):
                        become(sp, copy)
                for name in names:
                    broken.setdefault(name, capacity)
                if not filled:
                    known[key] = names
                    break
            verdict.count(table, broken)
    return verdicts


def verdict_table(verdicts: Verdicts) -> Iterator[str]:
    """Yield the lines of a table of what `check` returns."""
    yield f"{'':20}" + "".join(f"{caller:>12}{'':8}" for caller in CALLERS).rstrip()
    yield f"{'walk':12}{'array':8}" + " fine lost spin else" * len(CALLERS)
    for label, array in dict.fromkeys(key[:2] for key in verdicts):
        counts = [verdicts[label, array, caller].counts for caller in CALLERS]
        line = "".join(f"{count:5}" for each in counts for count in each.values())
        yield f"{label:12}{array:8}{line}"


# ====================================================================== the cost
# Counted, not timed, and counted from outside: so the figures are the same everywhere.


def set_bits(sp: kvm_mmu_page) -> Iterator[tuple[kvm_mmu_page, int]]:
    """Yield the set bits of `sp` and below it, as (page, index), depth first.

    >>> root = kvm_mmu_page(2)
    >>> for i in range(4):
    ...     kvm_unsync_page(shadow_page_at(root, i << 21))
    >>> mmu_page_zap_pte(root, 1)
    >>> set_large_spte(root, 2)
    >>> [i for sp, i in set_bits(root)]
    [0, 1, 2, 3]
    """
    for i in for_each_set_bit(sp.unsync_child_bitmap):
        yield sp, i
        ent = sp.spt[i]
        if is_shadow_present_pte(ent) and not is_large_pte(ent):
            yield from set_bits(to_shadow_page(ent))


class LeavesOnly(kvm_mmu_pages):
    """An array that takes no parents: with it, no walk gathers any."""

    __slots__ = ()

    def store(self, sp: kvm_mmu_page) -> bool:
        """Store `sp` as KVM does, but pass over a page above level 1."""
        return sp.level == PG_LEVEL_4K and super().store(sp)


# From `posted` on each differs from the one before in one thing: it gathers no parents;
# it adds before it clears; its array is full only if there is a page too many.  Then
# `check-first` gathers parents again, and asks before it goes down to one.
VARIANTS: dict[str, tuple[Walk, type[kvm_mmu_pages]]] = {
    "before": (walk_before, kvm_mmu_pages),
    "posted": (walk_posted, kvm_mmu_pages),
    "posted, no parents": (walk_posted, LeavesOnly),
    "suggested": (__mmu_unsync_walk, kvm_mmu_pages),
    "suggested, refusing": (__mmu_unsync_walk, RefusingPages),
    "check-first": (walk_check_first, kvm_mmu_pages),
}

# The levels of the root, and the addresses whose page tables are unsync.
COSTED: dict[str, tuple[int, list[int]]] = {
    "one page": (5, [0]),
    "sparse": (4, [i << 30 for i in range(24)]),
    "512 SPTEs": (4, [i << 21 for i in range(512)]),
    "32 x 32": (4, [i << 30 | j << 21 for i in range(32) for j in range(32)]),
}

Counts = dict[tuple[str, str], tuple[int, int]]


def cost(
    root: kvm_mmu_page,
    walk: Walk,
    pvec: kvm_mmu_pages,
    caller: Caller = mmu_sync_children,
) -> tuple[int, int]:
    """Sync `root`; count looks at a child, and batches (walks that return non-zero).

    The count is of calls in this module, so `walk` must be one of its own.

    >>> root = kvm_mmu_page(4)
    >>> kvm_unsync_page(shadow_page_at(root, 0))
    >>> cost(root, __mmu_unsync_walk, kvm_mmu_pages())
    (3, 1)
    """
    counts = {"to_shadow_page": 0, "mmu_unsync_walk": 0}
    counted = {name: globals()[name] for name in counts}

    def counting(name: str) -> Callable[..., object]:
        def call(*args: object) -> object:
            result = counted[name](*args)
            counts[name] += bool(result)
            return result

        return call

    globals().update({name: counting(name) for name in counts})
    try:
        caller(root, pvec, walk)
    finally:
        globals().update(counted)
    return counts["to_shadow_page"], counts["mmu_unsync_walk"]


def costs() -> Counts:
    """Return looks and batches by variant and table; "least" has each set bit once."""
    counts = {}
    for name, (levels, addresses) in COSTED.items():
        root = kvm_mmu_page(levels)
        pages = [shadow_page_at(root, gva) for gva in addresses]
        for label, (walk, array) in VARIANTS.items():
            for sp in pages:
                kvm_unsync_page(sp)
            counts["least", name] = len(list(set_bits(root))), 0
            counts[label, name] = cost(root, walk, array())
    return counts


def cost_table(counts: Counts) -> Iterator[str]:
    """Yield the lines of a table of what `costs` returns."""
    yield f"{'':20}" + "".join(f"{name:>14}" for name in COSTED)
    for label in "least", *VARIANTS:
        cells = [counts[label, name] for name in COSTED]
        line = "".join(f"{looks:10}{batches or '':4}" for looks, batches in cells)
        yield f"{label:20}{line}".rstrip()


# ====================================================================== the demo

Names = dict[kvm_mmu_page, str]


def described(ent: object, names: Names) -> str:
    """Say what an SPTE holds, or what a page is."""
    if not is_shadow_present_pte(ent):
        return "not present"
    if is_large_pte(ent):
        return "large"
    sp = to_shadow_page(ent)
    name = f", {names[sp]}" if sp in names else ""
    if sp.level > PG_LEVEL_4K:
        return f"level {sp.level}{name}, unsync_children {sp.unsync_children}"
    return f"level 1{name}, {'unsync' if sp.unsync else 'in sync'}"


def draw(root: kvm_mmu_page, names: Names | None = None) -> Iterator[str]:
    """Yield the lines of an ASCII tree: SPTE i as [i], or as [i*] if its bit is set.

    `names` says what pages translate, where that is worth saying.

    >>> root = kvm_mmu_page(3)
    >>> stack = shadow_page_at(root, 0x601000)
    >>> kvm_unsync_page(stack)
    >>> set_large_spte(root, 2)
    >>> print(*draw(root, {stack: "stack"}), sep="\\n")
    level 3, unsync_children 1
    |-[0*] level 2, unsync_children 1
    | `-[3*] level 1, stack, unsync
    `-[2 ] large
    """
    names = names or {}
    yield described(root, names)
    slots = sorted({*root.spt, *for_each_set_bit(root.unsync_child_bitmap)})
    for i in slots:
        fork, margin = ("`-", "  ") if i == slots[-1] else ("|-", "| ")
        bit = "*" if root.unsync_child_bitmap >> i & 1 else " "
        ent = root.spt[i]
        if is_shadow_present_pte(ent) and not is_large_pte(ent):
            first, *rest = draw(to_shadow_page(ent), names)
        else:
            first, rest = described(ent, names), []
        yield f"{fork}[{i}{bit}] {first}"
        yield from (margin + line for line in rest)


def spelled(ret: object) -> str:
    """Spell what a walk returned.

    >>> spelled(3), spelled(-ENOSPC)
    ('3', '-ENOSPC')
    """
    return "-ENOSPC" if ret == -ENOSPC else str(ret)


def narrate(
    root: kvm_mmu_page,
    pvec: kvm_mmu_pages,
    names: Names,
    walk: Walk = __mmu_unsync_walk,
) -> list[str]:
    """Walk from `root`, and return a line for each step, indented by level.

    The steps are seen from outside, as results of the functions that a walk calls; the
    bit that it is at is in its frame.

    >>> root, leaf, other = kvm_mmu_page(2), kvm_mmu_page(1), kvm_mmu_page(1)
    >>> for i, sp in (0, leaf), (1, other), (2, leaf), (3, other), (4, other):
    ...     link_shadow_page(root, i, sp)
    ...     kvm_unsync_page(sp)
    >>> mmu_page_zap_pte(root, 3)
    >>> set_large_spte(root, 4)
    >>> print(*narrate(root, kvm_mmu_pages(), {leaf: "A", other: "B"}), sep="\\n")
    look   SPTE 0: level 1, A, unsync
    add    A: entry 1 of 16
    clear  bit 0: 4 left
    look   SPTE 1: level 1, B, unsync
    add    B: entry 2 of 16
    clear  bit 1: 3 left
    look   SPTE 2: level 1, A, unsync
    add    A: entry 1 of 16
    clear  bit 2: 2 left
    look   SPTE 3: not present
    clear  bit 3: 1 left
    look   SPTE 4: large
    clear  bit 4: 0 left
    return 3
    """
    lines = []
    code = walk.__code__

    def see(frame: FrameType, event: str, result: object) -> None:
        if event != "return" or frame.f_back is None:
            return
        name, here = frame.f_code.co_name, frame.f_locals
        at = here if frame.f_code is code else frame.f_back.f_locals
        if frame.f_code is code:
            step = f"return {spelled(result)}"
        elif (name, bool(result)) in (
            ("is_shadow_present_pte", False),
            ("is_large_pte", True),
            ("to_shadow_page", True),
        ):
            step = f"look   SPTE {at['i']}: {described(here['ent'], names)}"
        elif name == "mmu_pages_add" and here["sp"] in pvec.sp:
            entry = pvec.nr - pvec.sp[::-1].index(here["sp"])
            step = f"add    {names[here['sp']]}: entry {entry} of {pvec.capacity}"
            step += ", the array is now full" if result else ""
        elif name == "mmu_pages_add":
            step = f"add    {names[here['sp']]}: refused, the array is full"
        elif name == "clear_unsync_child_bit":
            step = f"clear  bit {at['i']}: {at['sp'].unsync_children} left"
        else:
            return
        lines.append("    " * (root.level - at["sp"].level) + step)

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        mmu_unsync_walk(root, pvec, walk)
    finally:
        sys.setprofile(before)
    return lines


def demo_process() -> Iterator[str]:
    """Yield one walk of a process, step by step, and then a full array."""
    root, names = kvm_mmu_page(4), {}
    for name, gva in (
        ("text", 0x5555_5555_4000),
        ("heap", heap := 0x5555_5580_0000),
        ("libc", 0x7FFF_F7C2_8000),
        ("stack", 0x7FFF_FFFD_E000),
    ):
        sp = shadow_page_at(root, gva)
        names[sp] = f"{name} {gva:#x}"
        if name != "text":
            kvm_unsync_page(sp)
    direct_map, kernel = 0xFFFF_8880_0000_0000, kvm_mmu_page(3)
    names[kernel] = f"direct map {direct_map:#x}"
    link_shadow_page(root, direct_map >> 39 & 511, kernel)
    set_large_spte(kernel, direct_map >> 30 & 511)

    yield "A guest has written the page tables of its heap, libc and stack, and flushes"
    yield "the TLB.  [i] is SPTE i, [i*] one whose bit in unsync_child_bitmap is set."
    yield from draw(root, names)
    yield "The walk, a line for each step:"
    pvec = kvm_mmu_pages()
    yield from narrate(root, pvec, names)
    gathered = ", ".join(names[sp].split()[0] for sp in pvec.sp)
    yield f"The array holds {gathered}.  The caller syncs them:"
    for sp in for_each_sp(pvec):
        kvm_sync_page(sp)
    yield from draw(root, names)

    yield ""
    more = [shadow_page_at(root, heap + (i << 21)) for i in range(1, 21)]
    yield f"The heap grows by {len(more)} page tables, all unsync; the array takes 16."
    for sp in more:
        kvm_unsync_page(sp)
    for turn in 1, 2:
        ret = mmu_unsync_walk(root, pvec)
        for sp in for_each_sp(pvec):
            kvm_sync_page(sp)
        left = sum(sp.unsync for sp in more)
        bits, level = "", root.level
        for sp, i in set_bits(root):
            bits += (" > " if sp.level < level else " ") + f"[{i}]"
            level = sp.level
            if to_shadow_page(sp.spt[i]) is pvec.sp[-1]:
                bits += " (stale: filled the array)"
        result = f"{spelled(ret)}; {pvec.nr} pages are synced, {left} left."
        yield f"Walk {turn} returns {result}"
        yield f"  Set:{bits or ' no bit.'}"


def demo_question(table: Table, capacity: int) -> Iterator[str]:
    """Yield what the review feared, on a table that shows it, and why it is not so."""
    yield "YtcLiNskPb8z/2Qc@google.com asks: may `posted` clear a bit before it adds?"
    size = f"an array of {capacity}, the root first"
    yield f"If an add could fail, it would lose a page here ({size}):"
    for array in RefusingPages, kvm_mmu_pages:
        pages, pvec = table.build(), array(capacity)
        names = dict(zip(pages, ("root", *"ABCDEFGH")))
        if array is RefusingPages:
            yield from draw(pages[0], names)
        else:
            yield "KVM's array stores a page, and says at once if it is full now:"
        yield from narrate(pages[0], pvec, names, walk_posted)
        for sp in for_each_sp(pvec):
            kvm_sync_page(sp)
        mmu_sync_children(pages[0], pvec, walk_posted)
        left = ", ".join(names[sp] for sp in pages if sp.unsync)
        yield f"The caller syncs and walks until it gets 0: {left or 'none'} is unsync."


def demo(sptes: int = 2) -> Iterator[str]:
    """Yield the lines that `python unsync_walk.py` prints; `sptes` bounds the check."""
    yield from demo_process()
    yield ""
    found = check(sptes)
    (*_, capacity), table = found["posted", "refusing", "sync"].smallest["nothing lost"]
    yield from demo_question(table, capacity)
    yield ""
    yield f"Tables up to {sptes} SPTEs: how many are fine, lose a page, spin, or else?"
    yield "(refusing: a full array stores nothing; careless: dropped after -ENOSPC)"
    yield from verdict_table(found)
    yield ""
    yield "What a sync costs: looks at a child, then batches.  `before` is after 04/12;"
    yield "Linux never took the series, and looks about as often as `posted`."
    yield from cost_table(costs())


def main() -> None:
    """Print the demo, or what `-h` asks for; status 2 for any other argument."""
    if sys.argv[1:]:
        # Slow to import, and without an argument there is nothing to parse.
        import argparse

        parser = argparse.ArgumentParser(
            prog="unsync_walk.py",
            description="Show KVM's unsync walk step by step, judge the four walks of "
            "its patch thread on small tables, and count what they cost.",
            add_help=False,
        )
        # Python 3.9 gives its own group another title.
        parser.add_argument_group("options").add_argument(
            "-h", "--help", action="help", help="show this message and exit"
        )
        parser.parse_args()
    print("\n".join(demo()))


# ===================================================================== the tests


SLOW = "every small table"

__test__ = {
    "a page with two parents": """
    The leaf is stored once, and counted once for each bit that leads there.

    >>> root, leaf = kvm_mmu_page(3), kvm_mmu_page(1)
    >>> for i in 0, 1:
    ...     middle = kvm_mmu_page(2)
    ...     link_shadow_page(root, i, middle)
    ...     link_shadow_page(middle, 9, leaf)
    >>> kvm_unsync_page(leaf)
    >>> pvec = kvm_mmu_pages()
    >>> mmu_unsync_walk(root, pvec), pvec.nr, pvec.sp[0] is leaf
    (2, 1, True)
    >>> mmu_unsync_walk(root, pvec), pvec.nr
    (0, 0)

    A page that is not unsync is stored as often as it is added (KVM's parents are):

    >>> mmu_pages_add(pvec, root), mmu_pages_add(pvec, root), pvec.nr
    (False, False, 2)
    """,
    "the early stops of marking": """
    Marking stops at a bit that is set, and at a page that has another bit set: so it
    does not come to the root, whose bit the example has cleared to see that.

    >>> root = kvm_mmu_page(3)
    >>> first, second = shadow_page_at(root, 0), shadow_page_at(root, 0x200000)
    >>> kvm_unsync_page(first)
    >>> clear_unsync_child_bit(root, 0)
    >>> kvm_unsync_page(first)
    >>> kvm_unsync_page(second)
    >>> root.unsync_children, to_shadow_page(root.spt[0]).unsync_children
    (0, 2)
    """,
    "linking what is unsync": """
    A middle page with unsync children marks a new root, and that root's own parents.

    >>> middle, root, top = kvm_mmu_page(2), kvm_mmu_page(3), kvm_mmu_page(4)
    >>> link_shadow_page(top, 1, root)
    >>> kvm_unsync_page(shadow_page_at(middle, 0))
    >>> link_shadow_page(root, 2, middle)
    >>> print(*draw(top), sep="\\n")
    level 4, unsync_children 1
    `-[1*] level 3, unsync_children 1
      `-[2*] level 2, unsync_children 1
        `-[0*] level 1, unsync
    """,
    "stale bits": """
    Four ways for a bit to get stale: the SPTE was zapped, turned large, got another
    child, or its page was synced by way of another root.  A walk clears each.

    >>> root, other = kvm_mmu_page(2), kvm_mmu_page(2)
    >>> for i in range(4):
    ...     kvm_unsync_page(shadow_page_at(root, i << 21))
    >>> link_shadow_page(other, 0, to_shadow_page(root.spt[3]))
    >>> mmu_page_zap_pte(root, 0)
    >>> page = to_shadow_page(root.spt[1])
    >>> set_large_spte(root, 1)
    >>> page.parent_ptes
    []
    >>> mmu_page_zap_pte(root, 2)
    >>> link_shadow_page(root, 2, kvm_mmu_page(1))
    >>> mmu_sync_children(other)
    1
    >>> print(*draw(root), sep="\\n")
    level 2, unsync_children 4
    |-[0*] not present
    |-[1*] large
    |-[2*] level 1, in sync
    `-[3*] level 1, in sync
    >>> mmu_sync_children(root), root.unsync_children, root.unsync_child_bitmap
    (0, 0, 0)

    A large SPTE gives way to a page, and zapping it leaves nothing:

    >>> link_shadow_page(root, 1, kvm_mmu_page(1))
    >>> set_large_spte(root, 2)
    >>> mmu_page_zap_pte(root, 2)
    >>> mmu_page_zap_pte(root, 2)
    >>> print(*draw(root), sep="\\n")
    level 2, unsync_children 0
    |-[1 ] level 1, in sync
    `-[3 ] level 1, in sync
    """,
    "two roots": """
    What hangs below both is found from the one that is synced; the other keeps stale
    bits, which its own walk clears.

    >>> here, there, shared = kvm_mmu_page(3), kvm_mmu_page(3), kvm_mmu_page(2)
    >>> link_shadow_page(here, 0, shared)
    >>> link_shadow_page(there, 511, shared)
    >>> kvm_unsync_page(shadow_page_at(here, 0x3000))
    >>> kvm_unsync_page(shadow_page_at(there, 0))
    >>> mmu_sync_children(here), here.unsync_children, shared.unsync_children
    (1, 0, 0)
    >>> there.unsync_children
    2
    >>> mmu_sync_children(there), there.unsync_children
    (1, 0)
    """,
    "every level as root, and several full batches": """
    >>> for level in range(1, 6):
    ...     root = kvm_mmu_page(level)
    ...     for gva in range(0, min(50, 512 ** (level - 1)) << 21, 1 << 21):
    ...         kvm_unsync_page(shadow_page_at(root, gva))
    ...     pvec, batches = kvm_mmu_pages(), []
    ...     while mmu_unsync_walk(root, pvec):
    ...         batches.append(pvec.nr)
    ...         for page in pvec.sp:
    ...             kvm_sync_page(page)
    ...     print(level, batches, root.unsync_children)
    1 [] 0
    2 [16, 16, 16, 2] 0
    3 [16, 16, 16, 2] 0
    4 [16, 16, 16, 2] 0
    5 [16, 16, 16, 2] 0
    """,
    "zap": """
    A page is zapped out of every table that links it, and its unsync pages with it.

    >>> here, there = kvm_mmu_page(3), kvm_mmu_page(3)
    >>> for gva in range(0, 20 << 21, 1 << 21):
    ...     kvm_unsync_page(shadow_page_at(here, gva))
    >>> middle = to_shadow_page(here.spt[0])
    >>> set_large_spte(middle, 20)
    >>> in_sync = shadow_page_at(here, 21 << 21)
    >>> link_shadow_page(there, 7, middle)
    >>> kvm_mmu_prepare_zap_page(middle)
    >>> middle.spt, middle.parent_ptes, middle.unsync_children, in_sync.parent_ptes
    ({}, [], 0, [])
    >>> print(*draw(here), *draw(there), sep="\\n")
    level 3, unsync_children 1
    `-[0*] not present
    level 3, unsync_children 1
    `-[7*] not present
    >>> for gva in range(0, 20 << 21, 1 << 21):
    ...     kvm_unsync_page(shadow_page_at(here, gva))
    >>> mmu_zap_unsync_children(here, kvm_mmu_pages(capacity=3))
    20
    """,
    "addresses": """
    Each level takes 9 bits of index above the 12 of the page, and each is at its place:

    >>> gva = (1 << 48) | (2 << 39) | (3 << 30) | (4 << 21) | (5 << 12)
    >>> sp, path = shadow_page_at(kvm_mmu_page(5), gva), []
    >>> while sp.parent_ptes:
    ...     [(sp, index)] = sp.parent_ptes
    ...     path.append((sp.level, index, hex(sp.gfn << 12)))
    >>> for step in path:
    ...     print(*step)
    2 4 0x10100c0000000
    3 3 0x1010000000000
    4 2 0x1000000000000
    5 1 0x0
    """,
    "misuse": """
    Each is refused with what was given and what would be right, and changes nothing.

    >>> leaf, middle, other, top, root = map(kvm_mmu_page, (1, 2, 2, 3, 4))
    >>> link_shadow_page(middle, 7, leaf)
    >>> link_shadow_page(root, 7, top)
    >>> set_large_spte(middle, 8)
    >>> pvec = kvm_mmu_pages(capacity=1)
    >>> _ = mmu_pages_add(pvec, leaf)
    >>> def state():
    ...     return [(dict(page.spt), list(page.parent_ptes), page.unsync,
    ...              page.unsync_children, page.unsync_child_bitmap)
    ...             for page in (leaf, middle, other, top, root)] + pvec.sp
    >>> def refusal(call, *args):
    ...     before = state()
    ...     try:
    ...         return f"accepted: {call(*args)}"
    ...     except Exception as error:
    ...         changed = "" if state() == before else ", but it changed something"
    ...         return f"{type(error).__name__}: {error}{changed}"
    >>> def refused(*misuse):
    ...     print(refusal(*misuse))

    >>> refused(kvm_mmu_page, 0)
    ValueError: a level must be 1 to 5, not 0
    >>> refused(kvm_mmu_page, 6)
    ValueError: a level must be 1 to 5, not 6
    >>> refused(kvm_mmu_page, "4")
    TypeError: a level must be an int, not '4'
    >>> refused(kvm_mmu_page, True)
    TypeError: a level must be an int, not True
    >>> refused(kvm_mmu_page, 1, -1)
    ValueError: a gfn must be 0 to 4503599627370495, not -1
    >>> refused(kvm_mmu_page, 1, 1 << 52)
    ValueError: a gfn must be 0 to 4503599627370495, not 4503599627370496

    >>> refused(link_shadow_page, root, 0, middle)
    ValueError: a level-4 page links pages of level 3, not of level 2
    >>> refused(link_shadow_page, middle, 7, kvm_mmu_page(1))
    ValueError: SPTE 7 of kvm_mmu_page(2, gfn=0x0) already points at \
kvm_mmu_page(1, gfn=0x0): zap it first with mmu_page_zap_pte()
    >>> refused(link_shadow_page, middle, 1, None)
    TypeError: a kvm_mmu_page is needed, not None
    >>> refused(set_large_spte, leaf, 7)
    ValueError: a large SPTE is of level 2 or 3, not 1
    >>> refused(set_large_spte, root, 7)
    ValueError: a large SPTE is of level 2 or 3, not 4

    Whatever takes an SPTE takes a page and an index of 0 to 511:

    >>> takes_spte = (set_large_spte, mmu_page_zap_pte, mark_unsync,
    ...               clear_unsync_child_bit,
    ...               lambda parent, index: link_shadow_page(parent, index, None))
    >>> for spte in ("middle", 0.5), (middle, 512.5), (other, -1), (other, 512):
    ...     print(*{refusal(call, *spte) for call in takes_spte}, sep="\\n")
    TypeError: a kvm_mmu_page is needed, not 'middle'
    TypeError: the index of an SPTE must be an int, not 512.5
    IndexError: the index of an SPTE must be 0 to 511, not -1
    IndexError: the index of an SPTE must be 0 to 511, not 512

    >>> refused(kvm_unsync_page, middle)
    ValueError: only a level-1 page can be unsync, not level 2
    >>> refused(mark_unsync, leaf, 0)
    ValueError: kvm_mmu_page(1, gfn=0x0) has no children: mark a page above level 1
    >>> refused(kvm_sync_page, leaf)
    ValueError: kvm_mmu_page(1, gfn=0x0) is in sync: sync only a page that is unsync
    >>> refused(clear_unsync_child_bit, middle, 7)
    ValueError: bit 7 of kvm_mmu_page(2, gfn=0x0) is clear already: clear only a set bit
    >>> refused(kvm_mmu_pages, 0)
    ValueError: a capacity must be 1 to 9223372036854775807, not 0
    >>> refused(mmu_pages_add, pvec, middle)
    OverflowError: the array holds 1 pages already: after an add that returned true, \
the walk must return -ENOSPC

    >>> refused(shadow_page_at, root, 1 << 47)
    ValueError: with 4 levels 64-bit addresses are canonical in 48 bits: not so \
0x800000000000
    >>> refused(shadow_page_at, root, (1 << 64) - (1 << 47) - 1)
    ValueError: with 4 levels 64-bit addresses are canonical in 48 bits: not so \
0xffff7fffffffffff
    >>> refused(shadow_page_at, root, 1 << 64)
    ValueError: with 4 levels 64-bit addresses are canonical in 48 bits: not so \
0x10000000000000000
    >>> refused(shadow_page_at, root, -1)
    ValueError: with 4 levels 64-bit addresses are canonical in 48 bits: not so -0x1
    >>> refused(shadow_page_at, kvm_mmu_page(5), 1 << 56)
    ValueError: with 5 levels 64-bit addresses are canonical in 57 bits: not so \
0x100000000000000
    >>> refused(shadow_page_at, middle, 1 << 30)
    ValueError: with 2 levels addresses have 30 bits: not so 0x40000000
    >>> refused(shadow_page_at, middle, -1)
    ValueError: with 2 levels addresses have 30 bits: not so -0x1
    >>> refused(shadow_page_at, middle, 8 << 21)
    ValueError: 0x1000000 is covered by the large SPTE 8 of kvm_mmu_page(2, gfn=0x0): \
zap it first with mmu_page_zap_pte()
    >>> refused(shadow_page_at, middle, "0x1000")
    TypeError: a guest virtual address must be an int, not '0x1000'

    The addresses at the edge are good:

    >>> for level, edge in (1, 1 << 21), (3, 1 << 39), (4, 1 << 47), (5, 1 << 56):
    ...     _ = shadow_page_at(kvm_mmu_page(level), edge - 1)
    >>> for level, edge in (4, 1 << 47), (5, 1 << 56):
    ...     _ = shadow_page_at(kvm_mmu_page(level), (1 << 64) - edge)

    Nothing but pages and arrays will do:

    >>> refused(to_shadow_page, LARGE_SPTE)
    TypeError: an SPTE that points at a kvm_mmu_page is needed, not 'large SPTE'
    >>> takes_page = (kvm_unsync_page, kvm_mmu_mark_parents_unsync, kvm_sync_page,
    ...               kvm_mmu_prepare_zap_page, mmu_sync_children,
    ...               mmu_zap_unsync_children, lambda sp: shadow_page_at(sp, None),
    ...               lambda sp: mmu_pages_add(pvec, sp),
    ...               lambda sp: mmu_unsync_walk(sp, None))
    >>> print(*{refusal(call, "leaf") for call in takes_page})
    TypeError: a kvm_mmu_page is needed, not 'leaf'
    >>> refused(list, for_each_set_bit(-1))
    ValueError: a bitmap must be 0 or more, not -1
    >>> refused(mmu_unsync_walk, root, pvec, [])
    TypeError: a walk must be a function, not []
    >>> refused(mmu_unsync_walk, root, [], "posted")
    TypeError: a kvm_mmu_pages is needed, not []
    >>> takes_array = (lambda pvec: mmu_unsync_walk(root, pvec, walk_posted),
    ...                lambda pvec: mmu_sync_children(root, pvec),
    ...                lambda pvec: mmu_zap_unsync_children(root, pvec),
    ...                lambda pvec: mmu_pages_add(pvec, None))
    >>> print(*{refusal(call, []) for call in takes_array})
    TypeError: a kvm_mmu_pages is needed, not []
    """,
    "the other walks": """
    Walks that gather parents store the root first, then go depth first, parents before
    their leaves; a parent with nothing unsync below takes its room too.

    >>> def table():
    ...     root = kvm_mmu_page(3)
    ...     for gva in 0, 1 << 30, 2 << 30, 2 << 30 | 1 << 21:
    ...         kvm_unsync_page(shadow_page_at(root, gva))
    ...     kvm_sync_page(shadow_page_at(root, 1 << 30))
    ...     return root
    >>> pvec = kvm_mmu_pages()
    >>> for label, walk in WALKS.items():
    ...     root = table()
    ...     print(label, mmu_unsync_walk(root, pvec, walk), root.unsync_children,
    ...           [(sp.level, sp.gfn >> 9) for sp in pvec.sp])
    before 3 2 [(3, 0), (2, 0), (1, 0), (2, 512), (2, 1024), (1, 1024), (1, 1025)]
    posted 3 0 [(3, 0), (2, 0), (1, 0), (2, 512), (2, 1024), (1, 1024), (1, 1025)]
    suggested 3 0 [(1, 0), (1, 1024), (1, 1025)]
    check-first 3 0 [(3, 0), (2, 0), (1, 0), (2, 512), (2, 1024), (1, 1024), (1, 1025)]

    A batch may hold parents alone, and the next walk goes on from there:

    >>> root = kvm_mmu_page(3)
    >>> for gva in range(0, 15 << 30, 1 << 30):
    ...     kvm_unsync_page(shadow_page_at(root, gva))
    ...     kvm_sync_page(shadow_page_at(root, gva))
    >>> kvm_unsync_page(shadow_page_at(root, 15 << 30))
    >>> mmu_unsync_walk(root, pvec, walk_before) == -ENOSPC, list(for_each_sp(pvec))
    (True, [])
    >>> mmu_sync_children(root, pvec, walk_before)
    1

    With nothing unsync the array is empty, and the root is not stored either:

    >>> for walk in WALKS.values():
    ...     print(mmu_unsync_walk(kvm_mmu_page(3), pvec, walk), pvec.sp)
    0 []
    0 []
    0 []
    0 []

    Fewer entries than the root has levels are refused, and nothing changes:

    >>> pvec = kvm_mmu_pages(capacity=2)
    >>> _ = mmu_pages_add(pvec, root)
    >>> for call in mmu_unsync_walk, mmu_sync_children, mmu_zap_unsync_children:
    ...     try:
    ...         call(root, pvec, walk_posted)
    ...     except ValueError as error:
    ...         print(error, len(pvec.sp))
    a walk that gathers parents needs an array of at least 3 entries below a level-3 \
page, not 2 1
    a walk that gathers parents needs an array of at least 3 entries below a level-3 \
page, not 2 1
    a walk that gathers parents needs an array of at least 3 entries below a level-3 \
page, not 2 1
    """,
    "a leaf that is met again": """
    `check-first` asks for room even where there is nothing to store: the leaf is in the
    array, but the array is full when the walk meets it again.

    >>> root, leaf = kvm_mmu_page(2), kvm_mmu_page(1)
    >>> for i in 0, 1:
    ...     link_shadow_page(root, i, leaf)
    >>> kvm_unsync_page(leaf)
    >>> pvec = kvm_mmu_pages(capacity=2)
    >>> mmu_unsync_walk(root, pvec, walk_check_first) == -ENOSPC
    True
    >>> pvec.sp == [root, leaf]
    True
    >>> root.unsync_child_bitmap
    2
    """,
    "Linux as merged": """
    It has the walk of `before`, and its callers clear bottom-up the bits of what they
    synced.  So it looks about as often as `posted`, but comes to the parents again.

    >>> def clearing_bottom_up(parent, pvec, walk):
    ...     while mmu_unsync_walk(parent, pvec, walk):
    ...         for sp in for_each_sp(pvec):
    ...             kvm_sync_page(sp)
    ...             while sp is not parent and not sp.unsync_children:
    ...                 [(sp, index)] = sp.parent_ptes
    ...                 clear_unsync_child_bit(sp, index)
    >>> for name, (levels, addresses) in COSTED.items():
    ...     root = kvm_mmu_page(levels)
    ...     for gva in addresses:
    ...         kvm_unsync_page(shadow_page_at(root, gva))
    ...     looks, _ = cost(root, walk_before, kvm_mmu_pages(), clearing_bottom_up)
    ...     print(name, looks)
    one page 4
    sparse 52
    512 SPTEs 592
    32 x 32 1200
    """,
    "a walk that goes wrong": """
    What raises an exception here, a WARN or a write past the end in KVM, is a verdict,
    and larger arrays are tried all the same.

    >>> def greedy(sp, pvec):
    ...     found = 0
    ...     for i in for_each_set_bit(sp.unsync_child_bitmap):
    ...         clear_unsync_child_bit(sp, i)
    ...         if is_shadow_present_pte(sp.spt[i]) and not is_large_pte(sp.spt[i]):
    ...             child = to_shadow_page(sp.spt[i])
    ...             found += child.unsync + greedy(child, pvec)
    ...             if child.unsync:
    ...                 mmu_pages_add(pvec, child)
    ...     return found
    >>> print(check(2, {"greedy": greedy})["greedy", "KVM's", "zap"])
    53 tables: fine 52, lost 0, spin 0, else 1
    "no OverflowError" fails first with an array of 1, on
    level 2, page 0, unsync_children 2
    |-[0*] level 1, page 1, unsync
    `-[1*] level 1, page 2, unsync

    >>> def twice(sp, pvec):
    ...     clear_unsync_child_bit(sp, 0)
    ...     clear_unsync_child_bit(sp, 0)
    >>> [*check(1, {"twice": twice})["twice", "KVM's", "sync"].smallest]
    ['no ValueError']

    One that does not pass on that the array is full lets a bit go above others that are
    set.  It takes a root of level 4 to see it.

    >>> def deaf(sp, pvec):
    ...     found = 0
    ...     for i in for_each_set_bit(sp.unsync_child_bitmap):
    ...         if is_shadow_present_pte(sp.spt[i]) and not is_large_pte(sp.spt[i]):
    ...             child = to_shadow_page(sp.spt[i])
    ...             if child.unsync_children:
    ...                 ret = deaf(child, pvec)
    ...                 if ret < 0:
    ...                     return found + 1
    ...                 found += ret
    ...             elif child.unsync:
    ...                 if mmu_pages_add(pvec, child):
    ...                     return -ENOSPC
    ...                 found += 1
    ...         clear_unsync_child_bit(sp, i)
    ...     return found
    >>> print(check(3, {"deaf": deaf})["deaf", "KVM's", "sync"])
    317 tables: fine 316, lost 0, spin 0, else 1
    "nothing unfindable" fails first with an array of 1, on
    level 4, page 0, unsync_children 1
    `-[0*] level 3, page 1, unsync_children 1
      `-[0*] level 2, page 2, unsync_children 1
        `-[0*] level 1, page 3, unsync

    One that clears the bits of other parents as well is caught between two walks, when
    page 3 is still unsync, and the second root has lost the way to it.

    >>> def thorough(sp, pvec):
    ...     for i in for_each_set_bit(sp.unsync_child_bitmap):
    ...         if is_shadow_present_pte(sp.spt[i]) and not is_large_pte(sp.spt[i]):
    ...             for parent, index in to_shadow_page(sp.spt[i]).parent_ptes:
    ...                 if parent is not sp and parent.unsync_child_bitmap >> index & 1:
    ...                     clear_unsync_child_bit(parent, index)
    ...     return WALKS["suggested"](sp, pvec)
    >>> print(check(3, {"thorough": thorough})["thorough", "KVM's", "sync"])
    317 tables: fine 315, lost 0, spin 0, else 2
    "nothing unfindable" fails first with an array of 1, on
    level 2, page 0, unsync_children 2
    |-[0*] level 1, page 2, unsync
    `-[1*] level 1, page 3, unsync
    level 2, page 1, unsync_children 1
    `-[0*] level 1, page 3, unsync

    Arrays are tried up to one that does not fill up, which for one page has two entries.
    That one is the same in both readings, and runs once.

    >>> def tried(walk, sptes):
    ...     arrays = set()
    ...     def watched(sp, pvec):
    ...         arrays.add((type(pvec).__name__, pvec.capacity))
    ...         return walk(sp, pvec)
    ...     verdict = check(sptes, {"watched": watched})["watched", "KVM's", "sync"]
    ...     return sorted(arrays), verdict
    >>> tried(WALKS["suggested"], 1)[0]
    [('RefusingPages', 1), ('kvm_mmu_pages', 1), ('kvm_mmu_pages', 2)]

    A walk that finds all of them too small spins, and the check does not.

    >>> arrays, verdict = tried(lambda sp, pvec: -ENOSPC, 2)
    >>> [capacity for array, capacity in arrays if array == "RefusingPages"]
    [1, 2, 3, 4, 5, 6, 7, 8]
    >>> print(verdict)
    53 tables: fine 0, lost 0, spin 53, else 0
    "it ends" fails first with an array of 1, on
    level 2, page 0, unsync_children 1
    `-[0*] not present
    >>> check(0)
    Traceback (most recent call last):
    ValueError: a bound must be 1 to 9223372036854775807, not 0
    >>> check("4")
    Traceback (most recent call last):
    TypeError: a bound must be an int, not '4'
    """,
    "memory": """
    Level 1, where most pages are, shares one empty table of SPTEs; and nothing here has
    a dictionary for attributes, so that a misspelt one is refused, too.

    >>> kvm_mmu_page(1).spt is kvm_mmu_page(1).spt, kvm_mmu_page(2).spt is _NO_SPTES
    (True, False)
    >>> things = (kvm_mmu_page(2), kvm_mmu_page(2).spt, kvm_mmu_pages(),
    ...           RefusingPages(), LeavesOnly())
    >>> [thing for thing in things if hasattr(thing, "__dict__")]
    []
    """,
    "the command line": """
    Of arguments there is -h, and no other.

    >>> from contextlib import redirect_stderr
    >>> def run(*arguments):
    ...     argv, sys.argv = sys.argv, ["", *arguments]
    ...     try:
    ...         with redirect_stderr(sys.stdout):
    ...             main()
    ...     except SystemExit as error:
    ...         print("status", error.code)
    ...     finally:
    ...         sys.argv = argv
    >>> run("-h")  # doctest: +NORMALIZE_WHITESPACE
    usage: unsync_walk.py [-h]
    <BLANKLINE>
    Show KVM's unsync walk step by step, judge the four walks of its patch thread
    on small tables, and count what they cost.
    <BLANKLINE>
    options:
      -h, --help  show this message and exit
    status 0
    >>> run("--verbose")
    usage: unsync_walk.py [-h]
    unsync_walk.py: error: unrecognized arguments: --verbose
    status 2
    """,
    SLOW: """
    Nothing breaks in any walk but `posted`, and there only with the array that refuses;
    a careless caller breaks them all, each as it must.

    >>> from contextlib import redirect_stderr, redirect_stdout
    >>> from io import StringIO
    >>> class Terminal(StringIO):
    ...     def isatty(self):
    ...         return True
    >>> with redirect_stderr(Terminal()) as terminal:
    ...     found = check()
    >>> print(terminal.getvalue(), end="")
    500 of 2050 tables
    1000 of 2050 tables
    1500 of 2050 tables
    2000 of 2050 tables
    >>> for (walk, array, caller), verdict in found.items():
    ...     if verdict.smallest:
    ...         names = ", ".join(sorted(verdict.smallest))
    ...         print(f"{walk:12}{array:9}{caller:9}{names}")
    before      KVM's    careless it ends
    before      refusing careless it ends
    posted      KVM's    careless nothing lost, nothing unfindable
    posted      refusing sync     nothing lost, nothing unfindable
    posted      refusing zap      nothing lost, nothing unfindable
    posted      refusing careless nothing lost, nothing unfindable
    suggested   KVM's    careless it ends, nothing lost, nothing unfindable
    suggested   refusing careless nothing lost, nothing unfindable
    check-first KVM's    careless nothing lost, nothing unfindable
    check-first refusing careless nothing lost, nothing unfindable
    >>> GATHERS_PARENTS == {walk_before, walk_posted, walk_check_first}
    True

    README shows what a run prints, in every block of output and in its reading guide.

    >>> import os, re
    >>> with open(os.path.join(os.path.dirname(__file__), "README.md")) as file:
    ...     readme = file.read()
    >>> with redirect_stdout(StringIO()) as output:
    ...     argv, sys.argv = sys.argv, [""]
    ...     main()
    ...     sys.argv = argv
    >>> demonstrated, counts = output.getvalue().splitlines(), costs()
    >>> shown = "\\n".join([*demonstrated, *verdict_table(found), ""])
    >>> blocks = re.findall("```text\\n(.*?)```", readme, re.DOTALL)
    >>> lines = re.findall(r"^\\|.*\\| `(.*)` \\|$", readme, re.MULTILINE)
    >>> len(blocks), len(lines)
    (5, 7)
    >>> for line in "".join(blocks).splitlines() + lines:
    ...     if line not in shown:
    ...         print("not what a run prints:", line)
    >>> [block for block in blocks if block not in shown]
    []
    >>> len(demonstrated) <= 100, max(map(len, demonstrated)) <= 80, shown.isascii()
    (True, True, True)

    Its figures in bold, in their order:

    >>> def of(what, walk, array="KVM's", caller="sync"):
    ...     return found[walk, array, caller].counts[what]
    >>> def careless(what, walk):
    ...     return of(what, walk, caller="careless")
    >>> def sound(walk, array):
    ...     return of("fine", walk, array), of("fine", walk, array, "zap")
    >>> def row(label, name="512 SPTEs"):
    ...     return counts[label, name]
    >>> smallest = found["posted", "refusing", "zap"].smallest
    >>> (links, _, capacity), _ = smallest["nothing lost"]
    >>> alone = "posted, no parents"
    >>> figures = [
    ...     4, len(list(small_tables(4))),
    ...     of("lost", "posted", "refusing"), links, capacity,
    ...     of("else", "posted", "refusing"), of("lost", "posted"),
    ...     of("lost", "suggested") + of("lost", "suggested", "refusing"),
    ...     row("suggested")[0] - row(alone)[0], row("suggested")[1],
    ...     of("lost", "check-first") + of("lost", "check-first", "refusing"),
    ...     careless("lost", "posted"), careless("lost", "suggested"),
    ...     careless("lost", "check-first"),
    ...     careless("lost", "before"), careless("spin", "before"),
    ...     careless("spin", "suggested"),
    ...     *(row(label, "32 x 32")[0] for label in ("before", "posted", "least")),
    ...     592, 1200,
    ...     row("posted")[0], row("posted")[0] - row(alone)[0],
    ...     row("posted")[1] - row(alone)[1], row("suggested")[0] - row(alone)[0],
    ...     row("suggested")[0], row("suggested")[0] - row("suggested, refusing")[0],
    ... ]
    >>> bold = [int(figure) for figure in re.findall(r"\\*\\*(\\d+)\\*\\*", readme)]
    >>> [pair for pair in zip(bold, figures) if len({*pair}) > 1]
    []
    >>> len(bold) - len(figures)
    0
    >>> everything = figures[1], figures[1]
    >>> [label for label in WALKS if sound(label, "KVM's") != everything]
    []
    >>> [label for label in WALKS if sound(label, "refusing") != everything]
    ['posted']
    """,
}


def load_tests(loader: object, tests: object, pattern: object) -> object:
    """Collect the examples of this file and of README.md, the quick ones first."""
    import doctest
    import unittest

    suite = doctest.DocTestSuite(__name__)
    suite.addTest(doctest.DocFileSuite("README.md", package=__name__))
    return unittest.TestSuite(sorted(suite, key=lambda test: SLOW in str(test)))


if __name__ == "__main__":
    main()
