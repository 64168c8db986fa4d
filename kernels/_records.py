# SPDX-License-Identifier: Apache-2.0
"""How a GPU keeps held keys: records of 128 keys of one head, each channel by itself.

A channel's list begins with its first key's value and goes on with the values that fired; the lists of a record lie one
behind the other in a pool, in the keys' dtype. A bitmap says at which keys the channel fired, in words of 32 keys; the
first key has no bit. So key t of channel c is value number popcount(bits of c up to t) of the list: no key depends on
another, and an element costs one load. Where a channel's list begins follows from the bitmaps too.
"""

import triton
import triton.language as tl

RECORD = tl.constexpr(128)  # keys
WORD = tl.constexpr(32)  # keys of a word of the bitmap
WORDS = tl.constexpr(4)  # words of a channel


@triton.jit
def popcount(x):
    """The bits that are set in x, uint32. LLVM knows this form for the one instruction that it is."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def load_words(bits, D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr):
    """A record's bitmap, [4, D]: for each BC channels in turn a tile [BC] for each word."""
    tiles = ()
    for i in tl.static_range(BD // BC):
        column = i * BC + tl.arange(0, BC)
        for w in tl.static_range(WORDS):
            word = tl.load(bits + w * D + column, mask=column < D, other=0)
            tiles = tiles + (word.to(tl.uint32, bitcast=True),)
    return tiles


@triton.jit
def list_sizes(words, i: tl.constexpr, D: tl.constexpr, BC: tl.constexpr):
    """[BC]: how many values the channels from i * BC on have."""
    count = tl.where(i * BC + tl.arange(0, BC) < D, 1, 0)
    for w in tl.static_range(WORDS):
        count += popcount(words[i * WORDS + w])
    return count


@triton.jit
def list_starts(words, D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr):
    """For each BC channels a tile [BC]: where their lists begin in the record."""
    starts = ()
    before = 0
    for i in tl.static_range(BD // BC):
        count = list_sizes(words, i, D, BC)
        starts = starts + (before + tl.cumsum(count, 0) - count,)
        before += tl.sum(count, 0)
    return starts


@triton.jit
def places(start, word):
    """[BC, 32]: where the values of a word's keys are; `start` is where the lists' values before the word are, or their
    first ones."""
    t = tl.arange(0, WORD)
    up_to = tl.full([WORD], 0xFFFFFFFF, tl.uint32) >> (31 - t).to(tl.uint32)
    return start[:, None] + popcount(word[:, None] & up_to[None, :])
