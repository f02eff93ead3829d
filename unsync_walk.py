# SPDX-License-Identifier: GPL-2.0-only
"""KVM's unsync walk as a model that runs: one file, to be read beside its patch thread.

KVM shadows a guest's page tables with page tables of its own, the shadow pages.  The
guest may write the lowest level of its tables without KVM being told, so that the shadow
pages of that level drift: they are *unsync*.  When the guest flushes its TLB, KVM has to
find every unsync page below a root and bring it in line, or the guest goes on using a
translation that it has just taken back.

The way there is marked.  Each shadow page has a bitmap with a bit for each of its SPTEs,
and a set bit says: the page that this SPTE points at may be unsync, or lead to one.

        root  level 3   unsync_child_bitmap {0, 7}
             /        \\
        [0] /          \\ [7]
         level 2 {4}    level 2 {4, 5}      shadow pages form a DAG:
             \\          /    \\              this level-1 page has two parents,
          [4] \\    [4] /      \\ [5]         and a bit is set in each
               level 1        level 1
               unsync         unsync

A walk follows the set bits and gathers the unsync pages in an array; its caller syncs or
zaps what is in the array, and walks again until there is nothing left.  The array is
small, so a walk may have to break off.  In 2022 a patch proposed to clear the bits
during the walk, and its review asked in which order that is right:

    https://lore.kernel.org/r/YtcLiNskPb8z/2Qc@google.com

The file keeps the order of arch/x86/kvm/mmu/mmu.c: shadow pages, marking, the array, the
walk, its callers.  What mirrors KVM (Linux 5.19 unless a message of the thread is named)
has KVM's name; every other name is the model's.  Where KVM would WARN or write past the
end of its array, the model raises an exception.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from errno import ENOSPC
from itertools import product
from types import FrameType

__all__ = [
    "ENOSPC", "GATHERS_PARENTS", "KVM_PAGE_ARRAY_NR", "LARGE_SPTE", "PG_LEVEL_1G",
    "PG_LEVEL_2M", "PG_LEVEL_4K", "PT64_ROOT_MAX_LEVEL", "SPTE_ENT_PER_PAGE", "WALKS",
    "RefusingPages", "Table", "Verdict", "__mmu_unsync_walk", "check",
    "clear_unsync_child_bit", "cost_table", "costs", "draw", "for_each_set_bit",
    "for_each_sp", "is_large_pte", "is_shadow_present_pte",
    "kvm_mmu_mark_parents_unsync", "kvm_mmu_page", "kvm_mmu_pages",
    "kvm_mmu_prepare_zap_page", "kvm_sync_page", "kvm_unsync_page", "link_shadow_page",
    "mark_unsync", "mmu_is_page_vec_full", "mmu_page_zap_pte", "mmu_pages_add",
    "mmu_sync_children", "mmu_unsync_walk", "mmu_zap_unsync_children", "set_large_spte",
    "shadow_page_at", "small_tables", "to_shadow_page", "verdict_table", "walk_before",
    "walk_check_first", "walk_posted",
]

PG_LEVEL_4K = 1
PG_LEVEL_2M = 2
PG_LEVEL_1G = 3
PT64_ROOT_MAX_LEVEL = 5
PAGE_SHIFT = 12
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
        return None


# What the SPTEs of level 1 map is guest memory, which the model leaves out.
_NO_SPTES = _spt()


class kvm_mmu_page:
    """A shadow page of `level` 1 (`PG_LEVEL_4K`) to 5; `gfn` is a label here.

    `spt[i]` is SPTE i, `parent_ptes` lists the SPTEs that point here as (page, index).
    Bit i of `unsync_child_bitmap` is set if SPTE i may lead to an unsync page: a set bit
    may be stale, a clear bit must be true.  `unsync_children` counts the set bits.  Only
    a level-1 page can be `unsync` itself.

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

    Raises ValueError for a child of another level, or if there is a child already.

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
    now on.  Raises ValueError for a parent of another level.
    """
    _need_spte(parent, index)
    if not PG_LEVEL_2M <= parent.level <= PG_LEVEL_1G:
        raise ValueError(f"a large SPTE is of level 2 or 3, not {parent.level}")
    mmu_page_zap_pte(parent, index)
    parent.spt[index] = LARGE_SPTE


def mmu_page_zap_pte(parent: kvm_mmu_page, index: int) -> None:
    """Make SPTE `index` (0..511) of `parent` not present, and unlink a child there.

    The bit stays as it is: this is how a bit gets stale.

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

    Pages that are missing on the way are linked, and labelled with the first page frame
    of the addresses that they translate.  `gva` is in bytes, unsigned: below 4 levels at
    most 12 + 9 * level bits; with 4 or 5 levels 64 bits and canonical.

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
    """Return the shadow page that an SPTE points at; every look at a child comes here.

    Raises TypeError for an SPTE that points at none.
    """
    if isinstance(ent, kvm_mmu_page):
        return ent
    raise TypeError(f"an SPTE that points at a kvm_mmu_page is needed, not {ent!r}")


# ----------------------------------------------------------------------- marking


def kvm_unsync_page(sp: kvm_mmu_page) -> None:
    """The guest writes the table that `sp` shadows: make it unsync, and findable.

    Raises ValueError above level 1.

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
        raise ValueError(f"only a level-1 page can be unsync, not one of level {sp.level}")
    sp.unsync = True
    kvm_mmu_mark_parents_unsync(sp)


def kvm_mmu_mark_parents_unsync(sp: kvm_mmu_page) -> None:
    """Mark every SPTE that points at `sp`."""
    _need_page(sp)
    for parent, index in sp.parent_ptes:
        mark_unsync(parent, index)


def mark_unsync(sp: kvm_mmu_page, index: int) -> None:
    """Set bit `index` (0..511) of `sp`, and mark the way from the roots to `sp`.

    There are two early stops: the bit was set already, or another one was; either way
    the ancestors know.  Raises ValueError at level 1, where SPTEs have no children.
    """
    _need_spte(sp, index)
    if sp.level == PG_LEVEL_4K:
        raise ValueError(f"{sp} has no children: mark a page of level 2 or above")
    if sp.unsync_child_bitmap & 1 << index:
        return
    sp.unsync_child_bitmap |= 1 << index
    sp.unsync_children += 1
    if sp.unsync_children > 1:
        return
    kvm_mmu_mark_parents_unsync(sp)


def clear_unsync_child_bit(sp: kvm_mmu_page, index: int) -> None:
    """Clear bit `index` (0..511) of `sp`, and of `sp` alone.

    Raises ValueError if it is clear; KVM counts down all the same, and WARNs below 0.
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
        return len(self.sp)

    def store(self, sp: kvm_mmu_page) -> bool:
        """Store `sp`, and then say whether the array is now full, as KVM does.

        Raises OverflowError if it was full before: KVM would write past its end.
        """
        if self.nr == self.capacity:
            raise OverflowError(
                f"the array holds {self.capacity} pages already: after an add that "
                "returned true, the walk must return -ENOSPC"
            )
        self.sp.append(sp)
        return self.nr == self.capacity


def _need_array(pvec: object) -> None:
    if not isinstance(pvec, kvm_mmu_pages):
        raise TypeError(f"a kvm_mmu_pages is needed, not {pvec!r}")


def mmu_pages_add(pvec: kvm_mmu_pages, sp: kvm_mmu_page) -> bool:
    """Store `sp`, unless it is unsync and in the array already; true: the array is full.

    True does not mean that the page was left out, which is how the review reads it
    (YtcLiNskPb8z/2Qc@google.com), but that the *next* page would be: the answer of
    CAJhGHyAoM+6cOh7XQUvavgJcUts53FW6BnjM_wqMD6fkoYoB3w@mail.gmail.com.

    Raises OverflowError if the array is full.

    >>> pvec, first, second = kvm_mmu_pages(capacity=2), kvm_mmu_page(1), kvm_mmu_page(1)
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
    """Yield the indexes of the set bits of `bitmap`, rising.

    KVM's macro reads the bitmap as it goes, this one its value at the start.  It comes
    to the same: a walk clears no other bit of its page than the one that it is at.

    >>> list(for_each_set_bit(0b1001 | 1 << 511))
    [0, 3, 511]
    """
    while bitmap:
        lowest = bitmap & -bitmap
        yield lowest.bit_length() - 1
        bitmap ^= lowest


Walk = Callable[[kvm_mmu_page, kvm_mmu_pages], int]

# The contract of the walk: before mmu_lock is dropped, the caller must sync or zap every
# entry of the array, also when the walk returned -ENOSPC.  Only this makes it right to
# clear a bit when the page is added: from then on the array alone knows of the page.


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

    Raises ValueError if such a walk gets an array of fewer entries than `sp` has
    levels: parents alone would fill it, and the callers would never end.
    """
    _need_page(sp)
    _need_array(pvec)
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

    Raises ValueError if it was not unsync, where KVM's kvm_unlink_unsync_page() WARNs.
    """
    _need_page(sp)
    if not sp.unsync:
        raise ValueError(f"{sp} is in sync: sync only a page that is unsync")
    sp.unsync = False


def kvm_mmu_prepare_zap_page(sp: kvm_mmu_page) -> None:
    """Zap the unsync pages below `sp`, then take `sp` out of the table.

    All its children are unlinked, and all its parents; the bits there stay, stale.

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
    while sp.parent_ptes:
        mmu_page_zap_pte(*sp.parent_ptes[-1])
    sp.unsync = False


def for_each_sp(pvec: kvm_mmu_pages) -> Iterator[kvm_mmu_page]:
    """Yield the level-1 pages of the array, and pass over parents that a walk gathered."""
    for sp in pvec.sp:
        if sp.level == PG_LEVEL_4K:
            yield sp


def mmu_sync_children(
    parent: kvm_mmu_page,
    pvec: kvm_mmu_pages | None = None,
    walk: Walk = __mmu_unsync_walk,
) -> int:
    """Sync every unsync page below `parent`, an array at a time; return how many.

    `pvec` is the array to use, by default a fresh one of 16.  (KVM's function of this
    name returns a status.)

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

    `pvec` is the array to use, by default a fresh one of 16.

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
# From here on names are the model's: KVM has one walk at a time.


def walk_before(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
    """`before`: the walk that 05/12 was written for, with 04/12 applied.

    A bit is cleared only where the walk found nothing; that of a page which is synced
    now is left to the next walk.
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

        clear_unsync_child_bit(sp, i)
        if child.unsync:
            nr_unsync_leaf += 1
            if mmu_pages_add(pvec, child):
                return -ENOSPC

    return nr_unsync_leaf


def mmu_is_page_vec_full(pvec: kvm_mmu_pages) -> bool:
    """Whether an add would go past the end (Ytl+Tn8YBQR3KQFM@google.com)."""
    return pvec.nr == pvec.capacity


def walk_check_first(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
    """`check-first`: the resolution, Ytl+Tn8YBQR3KQFM@google.com.

    It asks whether the array is full before it adds, and only if there is something to
    add; what the add returns no longer matters.
    """
    nr_unsync_leaf = 0

    for i in for_each_set_bit(sp.unsync_child_bitmap):
        ent = sp.spt[i]

        if is_shadow_present_pte(ent) and not is_large_pte(ent):
            child = to_shadow_page(ent)

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


Row = tuple[object, ...]
Levels = tuple[tuple[Row, ...], ...]


class Table:
    """A small table, as what the SPTEs of its pages hold, level by level.

    `levels` has the roots (level 2 or 3) first and level 2 last; it has a row for each
    page of a level, and a row has for each SPTE the number of a page of the next level,
    LARGE_SPTE or None.  `unsync` says which of the level-1 pages are unsync.  The first
    root is the one to sync; a second one shares pages with it.

    Every SPTE here has its bit set.  One with a clear bit may be left out: no walk looks
    at it, and nothing below is unsync.  So with SPTEs that are stale among them, these
    tables are all the states that `nothing_unfindable` allows, whatever history led there.
    """

    def __init__(self, levels: Levels, unsync: tuple[bool, ...]) -> None:
        self.levels = levels
        self.unsync = unsync

    @property
    def size(self) -> tuple[int, int]:
        """The number of links and the number of pages."""
        rows = [row for rows in self.levels for row in rows]
        links = sum(isinstance(ent, int) for row in rows for ent in row)
        return links, len(rows) + len(self.unsync)

    def build(self) -> list[kvm_mmu_page]:
        """Return new pages: the root to sync first, those of level 1 last."""
        widths = [*map(len, self.levels), len(self.unsync)]
        pages = [
            [kvm_mmu_page(len(widths) - depth, gfn) for gfn in range(width)]
            for depth, width in enumerate(widths)
        ]
        for rows, here, below in zip(self.levels, pages, pages[1:]):
            for row, sp in zip(rows, here):
                for i, ent in enumerate(row):
                    if isinstance(ent, int):
                        link_shadow_page(sp, i, below[ent])
                    elif is_large_pte(ent):
                        set_large_spte(sp, i)
                    mark_unsync(sp, i)
        for sp, unsync in zip(pages[-1], self.unsync):
            if unsync:
                kvm_unsync_page(sp)
        return [sp for level in pages for sp in level]


def small_tables(sptes: int) -> Iterator[Table]:
    """Yield every table of up to `sptes` SPTEs, the smaller ones first.

    Tables that differ by naming are one: pages are numbered as they come up, and where
    no walk from the first root comes by, the order of the SPTEs is a matter of naming.

    >>> for table in small_tables(1):
    ...     print(table.levels, table.unsync)
    (((0,),),) (False,)
    (((0,),),) (True,)
    (((None,),),) ()
    ((('large SPTE',),),) ()
    (((0,),), ((),)) ()
    (((None,),), ()) ()
    ((('large SPTE',),), ()) ()
    """
    for size in range(1, sptes + 1):
        for level, roots in product((PG_LEVEL_2M, PG_LEVEL_1G), (1, 2)):
            for levels in _levels(level, roots, 1, size):
                if _shares(levels) if roots == 2 else levels[0][0]:
                    for unsync in product((False, True), repeat=_named(levels[-1])):
                        yield Table(levels, unsync)


def _named(rows: tuple[Row, ...]) -> int:
    """How many children `rows` link, numbered from 0 as they come up."""
    numbers = [ent for row in rows for ent in row if isinstance(ent, int)]
    return max(numbers, default=-1) + 1


def _shares(levels: Levels) -> bool:
    """Whether the second root leads to a page that the first one leads to."""
    walked = 1
    for rows in levels:
        reached = _named(rows[:walked])
        if any(child in range(reached) for row in rows[walked:] for child in row):
            return True
        walked = reached
    return False


def _levels(level: int, pages: int, walked: int, room: int) -> Iterator[Levels]:
    """Yield what `room` SPTEs can hold, from `pages` pages of `level` downwards.

    The first root leads to the first `walked` of the pages.
    """
    if level > PG_LEVEL_4K:
        for rows, left in _rows(pages, walked, room):
            reached = _named(rows[:walked])
            for below in _levels(level - 1, _named(rows), reached, left):
                yield (rows, *below)
    elif room == 0:
        yield ()


def _rows(pages: int, walked: int, room: int) -> Iterator[tuple[tuple[Row, ...], int]]:
    """Yield the rows that `pages` pages can have, and how many SPTEs are left."""
    if pages == 0:
        yield (), room
        return
    for rows, left in _rows(pages - 1, walked, room):
        for row in _row((), _named(rows), left, pages <= walked):
            yield (*rows, row), left - len(row)


def _row(
    row: Row, named: int, room: int, walked: bool, first: int = 0
) -> Iterator[Row]:
    """Yield `row` with up to `room` SPTEs more; children are numbered up to `named`."""
    yield row
    if room:
        for child in range(first, named + 1):
            more = max(named, child + 1)
            lowest = 0 if walked else child
            yield from _row((*row, child), more, room - 1, walked, lowest)
        if walked:
            for ent in None, LARGE_SPTE:
                yield from _row((*row, ent), named, room - 1, walked)


# The properties.  The first three hold after each caller's loop.


def nothing_lost(root: kvm_mmu_page) -> bool:
    """No unsync page can be reached from the root that was synced, bits or no bits."""
    return not root.unsync and all(
        nothing_lost(to_shadow_page(ent))
        for ent in root.spt.values()
        if not is_large_pte(ent)
    )


def nothing_unfindable(pages: list[kvm_mmu_page]) -> bool:
    """What is unsync, or has unsync children, has its bit set in every parent.

    This is what must hold whenever mmu_lock is free.
    """
    return all(
        parent.unsync_child_bitmap >> index & 1
        for sp in pages
        if sp.unsync or sp.unsync_children
        for parent, index in sp.parent_ptes
    )


def honest_counts(pages: list[kvm_mmu_page]) -> bool:
    """`unsync_children` is the number of set bits.

    >>> def miscounting(sp, pvec):
    ...     ret = WALKS["suggested"](sp, pvec)
    ...     sp.unsync_children += 1
    ...     return ret
    >>> print(check(1, {"miscounting": miscounting})["miscounting", "KVM's", "sync"])
    7 tables: 0 fine, 0 lost, 0 endless, 7 broken otherwise
    broken: honest counts, with an array of 1
    level 2, unsync_children 1
    `-[0*] not present
    """
    return all(
        sp.unsync_children == len(list(for_each_set_bit(sp.unsync_child_bitmap)))
        for sp in pages
    )


def nothing_spurious(batch: list[kvm_mmu_page]) -> bool:
    """In an array that a walk filled, each level-1 page stands once, and is unsync.

    >>> def repeating(sp, pvec):
    ...     ret = WALKS["suggested"](sp, pvec)
    ...     pvec.sp *= 2
    ...     return ret
    >>> print(check(1, {"repeating": repeating})["repeating", "KVM's", "sync"])
    7 tables: 6 fine, 0 lost, 0 endless, 1 broken otherwise
    broken: nothing spurious, with an array of 1
    level 2, unsync_children 1
    `-[0*] level 1, unsync
    """
    return len(set(batch)) == len(batch) and all(sp.unsync for sp in batch)


class Broken(Exception):
    """A property that breaks while a caller is still looping."""


def broken_by(
    pages: list[kvm_mmu_page],
    caller: Callable[[kvm_mmu_page, kvm_mmu_pages, Walk], object],
    pvec: kvm_mmu_pages,
    walk: Walk,
) -> tuple[list[str], bool]:
    """Let `caller` loop over `pages[0]`: which properties break; is the array too small?

    The loop never ends if bits and unsync pages are what they were before another walk.
    """
    seen = set()
    too_small = False

    def observed(sp: kvm_mmu_page, pvec: kvm_mmu_pages) -> int:
        nonlocal too_small
        state = tuple([(page.unsync, page.unsync_child_bitmap) for page in pages])
        if state in seen:
            raise Broken("it ends")
        seen.add(state)
        ret = walk(sp, pvec)
        too_small = too_small or ret == -ENOSPC and mmu_is_page_vec_full(pvec)
        if not nothing_spurious(list(for_each_sp(pvec))):
            raise Broken("nothing spurious")
        return ret

    if walk in GATHERS_PARENTS:
        GATHERS_PARENTS.add(observed)
    try:
        caller(pages[0], pvec, observed)
    except Broken as error:
        return [str(error)], too_small
    except (OverflowError, TypeError, ValueError):
        return ["no misuse"], too_small
    finally:
        GATHERS_PARENTS.discard(observed)
    holds = {
        "nothing lost": nothing_lost(pages[0]),
        "nothing unfindable": nothing_unfindable(pages),
        "honest counts": honest_counts(pages),
    }
    return [name for name in holds if not holds[name]], too_small


def sync_carelessly(parent: kvm_mmu_page, pvec: kvm_mmu_pages, walk: Walk) -> None:
    """Break the contract: drop what is in the array after -ENOSPC, and walk again."""
    while ret := mmu_unsync_walk(parent, pvec, walk):
        if ret > 0:
            for sp in for_each_sp(pvec):
                kvm_sync_page(sp)


ARRAYS = {"KVM's": kvm_mmu_pages, "refusing": RefusingPages}
CALLERS: dict[str, Callable[[kvm_mmu_page, kvm_mmu_pages, Walk], object]] = {
    "sync": mmu_sync_children,
    "zap": mmu_zap_unsync_children,
    "careless": sync_carelessly,
}


class Verdict:
    """On how many `tables` all is `fine`, a page is `lost`, or the loop is `endless`.

    A table counts as lost if a page is at any capacity.  `smallest` has, by the name of
    each property that broke, the smallest case: its links, pages, capacity and table.
    """

    def __init__(self) -> None:
        self.tables = self.fine = self.lost = self.endless = 0
        self.smallest: dict[str, tuple[int, int, int, Table]] = {}

    def count(self, table: Table, broken: dict[str, int]) -> None:
        """Take in a table; `broken` has for each property the first capacity at fault."""
        self.tables += 1
        self.fine += not broken
        self.lost += "nothing lost" in broken
        self.endless += "it ends" in broken and "nothing lost" not in broken
        for name, capacity in broken.items():
            case = (*table.size, capacity, table)
            if name not in self.smallest or case[:3] < self.smallest[name][:3]:
                self.smallest[name] = case

    def __str__(self) -> str:
        line = f"{self.tables} tables: {self.fine} fine, {self.lost} lost"
        rest = self.tables - self.fine - self.lost - self.endless
        line += f", {self.endless} endless" + (f", {rest} broken otherwise" * (rest > 0))
        lines = [line]
        for name, (_, _, capacity, table) in self.smallest.items():
            lines.append(f"broken: {name}, with an array of {capacity}")
            lines.extend(draw(table.build()[0], {}))
        return "\n".join(lines)


def become(sp: kvm_mmu_page, other: kvm_mmu_page) -> None:
    """Give `sp` all that `other` has: this takes back what was done to a table."""
    sp.unsync = other.unsync
    sp.unsync_children = other.unsync_children
    sp.unsync_child_bitmap = other.unsync_child_bitmap
    sp.spt.clear()
    sp.spt.update(other.spt)
    sp.parent_ptes[:] = other.parent_ptes


def check(
    sptes: int = 4, walks: dict[str, Walk] = WALKS
) -> dict[tuple[str, str, str], Verdict]:
    """Judge `walks` on every table of up to `sptes` SPTEs.

    Each walk runs with each of ARRAYS, at every capacity from the smallest legal one to
    one that suffices, and with each of CALLERS; the result is by walk, array and caller.
    Each SPTE more takes seven times as long.  A terminal on stderr is shown progress.

    >>> print(check(2)["posted", "refusing", "zap"])
    42 tables: 41 fine, 1 lost, 0 endless
    broken: nothing lost, with an array of 2
    level 2, unsync_children 2
    |-[0*] level 1, unsync
    `-[1*] level 1, unsync
    broken: nothing unfindable, with an array of 2
    level 2, unsync_children 2
    |-[0*] level 1, unsync
    `-[1*] level 1, unsync
    """
    verdicts = {key: Verdict() for key in product(walks, ARRAYS, CALLERS)}
    tables = list(small_tables(sptes))
    for number, table in enumerate(tables, 1):
        if number % 5000 == 0 and sys.stderr.isatty():
            print(f"{number} of {len(tables)} tables", file=sys.stderr)
        pages = table.build()
        before = [kvm_mmu_page(sp.level) for sp in pages]
        for sp, copy in zip(pages, before):
            become(copy, sp)
        for (label, array, caller), verdict in verdicts.items():
            walk = walks[label]
            broken: dict[str, int] = {}
            capacity = pages[0].level if walk in GATHERS_PARENTS else 1
            too_small = True
            while too_small:
                pvec = ARRAYS[array](capacity)
                names, too_small = broken_by(pages, CALLERS[caller], pvec, walk)
                for name in names:
                    broken.setdefault(name, capacity)
                capacity += 1
                for sp, copy in zip(pages, before):
                    become(sp, copy)
            verdict.count(table, broken)
    return verdicts


# ====================================================================== the cost
# Counted, not timed, and counted from outside: so the figures are the same everywhere.


def watched(
    see: Callable[[FrameType, str, object], None],
    call: Callable[..., object],
    *args: object,
) -> None:
    """Run `call(*args)`, and tell `see` of each call and result inside it."""
    before = sys.getprofile()
    sys.setprofile(see)
    try:
        call(*args)
    finally:
        sys.setprofile(before)


def set_bits(sp: kvm_mmu_page) -> Iterator[tuple[kvm_mmu_page, int]]:
    """Yield every set bit below `sp`, as (page, index), the way down before its end."""
    for i in for_each_set_bit(sp.unsync_child_bitmap):
        yield sp, i
        ent = sp.spt[i]
        if is_shadow_present_pte(ent) and not is_large_pte(ent):
            yield from set_bits(to_shadow_page(ent))


class LeavesOnly(kvm_mmu_pages):
    """An array that takes no parents: what any walk costs if it does not gather them."""

    __slots__ = ()

    def store(self, sp: kvm_mmu_page) -> bool:
        """Store `sp` as KVM does, but pass over a page above level 1."""
        return sp.level == PG_LEVEL_4K and super().store(sp)


# Neighbours differ in one thing: `posted` with LeavesOnly gathers no parents, and
# `suggested` then turns its order round; RefusingPages is full only when it is asked to
# take one page more; `check-first` gathers the parents again.
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


def cost(root: kvm_mmu_page, walk: Walk, pvec: kvm_mmu_pages) -> tuple[int, int]:
    """Sync `root`; count looks at a child, and batches (walks that return non-zero).

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
        mmu_sync_children(root, pvec, walk)
    finally:
        globals().update(counted)
    return counts["to_shadow_page"], counts["mmu_unsync_walk"]


def costs() -> dict[tuple[str, str], tuple[int, int]]:
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


def cost_table(counts: dict[tuple[str, str], tuple[int, int]]) -> Iterator[str]:
    """Yield the lines of a table of what `costs` returns."""
    yield f"{'':20}" + "".join(f"{name:>14}" for name in COSTED)
    for label in "least", *VARIANTS:
        cells = [counts[label, name] for name in COSTED]
        line = "".join(f"{looks:10}{batches or '':4}" for looks, batches in cells)
        yield f"{label:20}{line}".rstrip()


def verdict_table(verdicts: dict[tuple[str, str, str], Verdict]) -> Iterator[str]:
    """Yield the lines of a table of what `check` returns."""
    yield f"{'':23}" + "".join(f"{caller:^18}" for caller in CALLERS).rstrip()
    yield f"{'walk':12}{'array':11}" + "  fine  lost  ends" * len(CALLERS)
    for label, array in dict.fromkeys(key[:2] for key in verdicts):
        cells = [verdicts[label, array, caller] for caller in CALLERS]
        yield f"{label:12}{array:11}" + "".join(
            f"{cell.fine:6}{cell.lost:6}{cell.endless:6}" for cell in cells
        )


# ====================================================================== the demo
# From here on nothing is KVM's.


def _state(sp: kvm_mmu_page, names: dict[kvm_mmu_page, str]) -> str:
    name = f", {names[sp]}" if sp in names else ""
    if sp.level == PG_LEVEL_4K:
        return f"level 1{name}, {'unsync' if sp.unsync else 'in sync'}"
    return f"level {sp.level}{name}, unsync_children {sp.unsync_children}"


def draw(
    root: kvm_mmu_page, names: dict[kvm_mmu_page, str] | None = None
) -> Iterator[str]:
    """Yield the lines of an ASCII tree: SPTE i as [i], or as [i*] if its bit is set.

    `names` says what a page translates, where that is worth saying.

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

    def below(sp: kvm_mmu_page, margin: str) -> Iterator[str]:
        slots = sorted({*sp.spt, *for_each_set_bit(sp.unsync_child_bitmap)})
        for i in slots:
            ent = sp.spt[i]
            bit = "*" if sp.unsync_child_bitmap >> i & 1 else " "
            fork, rest = ("`-", "  ") if i == slots[-1] else ("|-", "| ")
            if not is_shadow_present_pte(ent):
                yield f"{margin}{fork}[{i}{bit}] not present"
            elif is_large_pte(ent):
                yield f"{margin}{fork}[{i}{bit}] large"
            else:
                yield f"{margin}{fork}[{i}{bit}] {_state(to_shadow_page(ent), names)}"
                yield from below(to_shadow_page(ent), margin + rest)

    yield _state(root, names)
    yield from below(root, "")


def narrate(
    root: kvm_mmu_page,
    pvec: kvm_mmu_pages,
    names: dict[kvm_mmu_page, str],
    walk: Walk = __mmu_unsync_walk,
) -> Iterator[str]:
    """Walk from `root`, and yield a line for each step, indented by level.

    The steps are the calls and results of the functions that a walk is made of.
    """
    lines: list[str] = []
    nr = 0

    def see(frame: FrameType, event: str, result: object) -> None:
        nonlocal nr
        function, here = frame.f_code, frame.f_locals
        if event == "call" and function is mmu_pages_add.__code__:
            nr = pvec.nr
        if event != "return" or frame.f_back is None:
            return
        at = frame if function in walks else frame.f_back
        i = at.f_locals.get("i")
        if function is is_shadow_present_pte.__code__ and not result:
            step = f"look   SPTE {i}: not present, the bit is stale"
        elif function is is_large_pte.__code__ and result:
            step = f"look   SPTE {i}: large, the bit is stale"
        elif function is to_shadow_page.__code__:
            step = f"look   SPTE {i}: {_state(here['ent'], names)}"
        elif function is mmu_pages_add.__code__:
            step = f"add    {names[here['sp']]}: "
            if pvec.nr == nr:
                step += "refused, the array is full" if result else "is in it already"
            else:
                step += f"entry {pvec.nr} of {pvec.capacity}"
                step += ", the array is now full" if result else ""
        elif function is clear_unsync_child_bit.__code__:
            step = f"clear  bit {i}: unsync_children {here['sp'].unsync_children}"
        elif function in walks:
            step = f"return {spelled(result)}"
        else:
            return
        depth = root.level - at.f_locals["sp"].level
        lines.append("    " * depth + step)

    walks = {walk.__code__ for walk in WALKS.values()}
    watched(see, mmu_unsync_walk, root, pvec, walk)
    yield from lines


def spelled(ret: object) -> str:
    """Spell what a walk returned.

    >>> spelled(3), spelled(-ENOSPC)
    ('3', '-ENOSPC')
    """
    return "-ENOSPC" if ret == -ENOSPC else str(ret)


def demo_process() -> Iterator[str]:
    """Yield one walk of a process, step by step, and then a full array."""
    root = kvm_mmu_page(4)
    names = {}
    for name, gva, written in (
        ("text", 0x5555_5555_4000, False),
        ("heap", 0x5555_5580_0000, True),
        ("libc", 0x7FFF_F7C2_8000, True),
        ("stack", 0x7FFF_FFFD_E000, True),
    ):
        sp = shadow_page_at(root, gva)
        names[sp] = f"{name} {gva:#x}"
        if written:
            kvm_unsync_page(sp)
    kernel = kvm_mmu_page(3)
    names[kernel] = f"direct map {0xFFFF_8880_0000_0000:#x}"
    link_shadow_page(root, 0xFFFF_8880_0000_0000 >> 39 & 511, kernel)
    set_large_spte(kernel, 0)

    yield "A guest has written the page tables of its heap, libc and stack, and flushes"
    yield "the TLB.  [i] is SPTE i, [i*] one whose bit in unsync_child_bitmap is set."
    yield from draw(root, names)
    yield "The walk, a line for each step:"
    pvec = kvm_mmu_pages()
    yield from narrate(root, pvec, names)
    for sp in for_each_sp(pvec):
        kvm_sync_page(sp)
    gathered = ", ".join(names[sp].split()[0] for sp in pvec.sp)
    yield f"The array holds {gathered}.  The caller syncs them:"
    yield from draw(root, names)

    yield ""
    more = range(0x5555_55A0_0000, 0x5555_5820_0000, 1 << 21)
    for gva in more:
        kvm_unsync_page(shadow_page_at(root, gva))
    yield f"The heap grows by {len(more)} page tables, all unsync; the array takes 16."
    for turn in 1, 2:
        ret = mmu_unsync_walk(root, pvec)
        for sp in for_each_sp(pvec):
            kvm_sync_page(sp)
        left = sum(shadow_page_at(root, gva).unsync for gva in more)
        bits: dict[int, list[str]] = {}
        for sp, i in set_bits(root):
            bits.setdefault(sp.level, []).append(str(i))
        yield f"Walk {turn} returns {spelled(ret)}.  {pvec.nr} pages are synced, " + (
            f"{left} are left.  {'The bits that are set' if bits else 'No bit is set.'}"
        )
        if bits:
            yield "lead to these: " + "; ".join(
                f"level {level}: {', '.join(marks)}" for level, marks in bits.items()
            )
            [(parent, i)] = pvec.sp[-1].parent_ptes
            stale = parent.unsync_child_bitmap >> i & 1
            yield f"({i} is {'stale' if stale else 'clear'}: its page filled the array)."


def demo_question(found: dict[tuple[str, str, str], Verdict]) -> Iterator[str]:
    """Yield what the review feared, on the smallest table that shows it, and the answer."""
    *_, capacity, table = found["posted", "refusing", "sync"].smallest["nothing lost"]
    yield "YtcLiNskPb8z/2Qc@google.com asks: may `posted` clear a bit before it adds, if"
    yield f"the add can fail?  The smallest table where it loses a page, {capacity} entries:"
    for array in RefusingPages, kvm_mmu_pages:
        root, *pages = table.build()
        names = {root: "root", **{sp: f"page {sp.gfn}" for sp in pages}}
        if array is RefusingPages:
            yield from draw(root, names)
        else:
            yield "With KVM's array, which stores the page and then says that it is full:"
        pvec = array(capacity)
        yield from narrate(root, pvec, names, walk_posted)
        for sp in for_each_sp(pvec):
            kvm_sync_page(sp)
        mmu_sync_children(root, pvec, walk_posted)
        lost = [names[sp] for sp in pages if sp.unsync]
        yield f"After the caller's loop {' and '.join(lost) or 'no page'} is unsync."


DEMO_SPTES = 2


def demo() -> Iterator[str]:
    """Yield the lines that `python unsync_walk.py` prints."""
    yield from demo_process()
    yield ""
    found = check(DEMO_SPTES)
    yield from demo_question(found)
    yield ""
    tables = found["suggested", "KVM's", "sync"].tables
    yield f"All {tables} tables of up to {DEMO_SPTES} SPTEs: how many are fine, lose a page, never end?"
    yield "(refusing: a full array stores nothing; careless: dropped after -ENOSPC)"
    yield from verdict_table(found)
    yield ""
    yield "What a sync costs: looks at a child, and batches.  `before` is the tree after"
    yield "04/12; Linux as merged looks about as often as `posted`, then at parents again."
    yield from cost_table(costs())


def main() -> None:
    """Print the demo, or what `-h` asks for; status 2 for any other argument."""
    if sys.argv[1:]:
        # It takes as long to import as half the demo takes to run.
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
    print(*demo(), sep="\n")


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
    >>> print(*draw(top, {}), sep="\\n")
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
    >>> print(*draw(root, {}), sep="\\n")
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
    >>> print(*draw(root, {}), sep="\\n")
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
    >>> print(*draw(here, {}), *draw(there, {}), sep="\\n")
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
    ...               lambda parent, index: link_shadow_page(parent, index, leaf))
    >>> for spte in ("middle", 0.5), (middle, 512.5), (other, -1), (other, 512):
    ...     print(*{refusal(call, *spte) for call in takes_spte}, sep="\\n")
    TypeError: a kvm_mmu_page is needed, not 'middle'
    TypeError: the index of an SPTE must be an int, not 512.5
    IndexError: the index of an SPTE must be 0 to 511, not -1
    IndexError: the index of an SPTE must be 0 to 511, not 512

    >>> refused(kvm_unsync_page, middle)
    ValueError: only a level-1 page can be unsync, not one of level 2
    >>> refused(mark_unsync, leaf, 0)
    ValueError: kvm_mmu_page(1, gfn=0x0) has no children: mark a page of level 2 or above
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
    ...               mmu_zap_unsync_children, lambda sp: shadow_page_at(sp, 0),
    ...               lambda sp: mmu_pages_add(pvec, sp))
    >>> print(*{refusal(call, "leaf") for call in takes_page})
    TypeError: a kvm_mmu_page is needed, not 'leaf'
    >>> refused(mmu_sync_children, root, [])
    TypeError: a kvm_mmu_pages is needed, not []
    >>> refused(mmu_zap_unsync_children, root, [])
    TypeError: a kvm_mmu_pages is needed, not []
    >>> refused(mmu_pages_add, [], leaf)
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
    "misuse by a walk": """
    What raises an exception here, a WARN or a write past the end in KVM, is a verdict.

    >>> def greedy(sp, pvec):
    ...     for i in for_each_set_bit(sp.unsync_child_bitmap):
    ...         mmu_pages_add(pvec, to_shadow_page(sp.spt[i]))
    ...         clear_unsync_child_bit(sp, i)
    ...     return pvec.nr
    >>> greedily = check(2, {"greedy": greedy})["greedy", "KVM's", "zap"]
    >>> {name: case[:3] for name, case in greedily.smallest.items()}["no misuse"]
    (0, 1, 1)
    >>> GATHERS_PARENTS == {walk_before, walk_posted, walk_check_first}
    True
    """,
    "the demo fits a terminal": """
    >>> lines = list(demo())
    >>> len(lines) <= 100, max(map(len, lines)) <= 80, "".join(lines).isascii()
    (True, True, True)
    """,
    SLOW: """
    Nothing breaks in any walk but `posted`, and there only with the array that refuses;
    a careless caller breaks them all, each as it must.

    >>> found = check()
    >>> for (walk, array, caller), verdict in found.items():
    ...     if verdict.fine < verdict.tables:
    ...         print(f"{walk:12}{array:9}{caller:9}{', '.join(verdict.smallest)}")
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

    README shows what a run prints, in every block of output and in its reading guide.

    >>> import os, re
    >>> with open(os.path.join(os.path.dirname(__file__), "README.md")) as file:
    ...     readme = file.read()
    >>> counts = costs()
    >>> shown = "\\n".join([*demo(), *verdict_table(found), *cost_table(counts), ""])
    >>> blocks = re.findall("```text\\n(.*?)```", readme, re.DOTALL)
    >>> len(blocks), [block for block in blocks if block not in shown]
    (3, [])
    >>> lines = re.findall(r"^\\|.*\\| `(.*)` \\|$", readme, re.MULTILINE)
    >>> len(lines), [line for line in lines if line not in shown]
    (7, [])

    Its figures in bold, in their order:

    >>> def lost(walk, array, caller="sync"):
    ...     return found[walk, array, caller].lost
    >>> def endless(walk):
    ...     return found[walk, "KVM's", "careless"].endless
    >>> def more(label, than, what, name="512 SPTEs"):
    ...     return counts[label, name][what] - counts[than, name][what]
    >>> looks, batches = 0, 1
    >>> feared = found["posted", "refusing", "sync"].smallest["nothing lost"]
    >>> figures = [
    ...     4, found["suggested", "KVM's", "sync"].tables,
    ...     lost("posted", "refusing"), feared[0], feared[2],
    ...     lost("posted", "KVM's"),
    ...     lost("suggested", "KVM's") + lost("suggested", "refusing"),
    ...     more("suggested", "posted, no parents", looks),
    ...     counts["suggested", "512 SPTEs"][batches],
    ...     lost("check-first", "KVM's") + lost("check-first", "refusing"),
    ...     lost("posted", "KVM's", "careless"), lost("suggested", "KVM's", "careless"),
    ...     lost("check-first", "KVM's", "careless"), lost("before", "KVM's", "careless"),
    ...     endless("before"), endless("suggested"), len(list(small_tables(5))),
    ...     *(counts[label, "32 x 32"][looks] for label in ("before", "posted", "least")),
    ...     more("suggested", "posted, no parents", looks),
    ...     more("posted", "posted, no parents", looks),
    ...     more("posted", "posted, no parents", batches),
    ...     more("suggested", "suggested, refusing", looks),
    ... ]
    >>> [int(figure) for figure in re.findall(r"\\*\\*(\\d+)\\*\\*", readme)] == figures
    True
    >>> lost("posted", "refusing") == lost("posted", "refusing", "zap")
    True
    """,
}


def load_tests(loader: object, tests: object, pattern: object) -> object:
    """Collect the examples of this file and of README.md, the quick ones first."""
    import doctest
    import unittest

    examples = sorted(doctest.DocTestSuite(__name__), key=lambda test: SLOW in str(test))
    readme = doctest.DocFileSuite("README.md", package=__name__)
    return unittest.TestSuite([*examples[:-1], readme, examples[-1]])


if __name__ == "__main__":
    main()
