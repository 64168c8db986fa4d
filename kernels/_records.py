# SPDX-License-Identifier: Apache-2.0
"""How a GPU keeps held keys: records of 128 keys of one head, each channel by itself.

A channel's list begins with its first key's value and goes on with the values that fired; the lists of a record lie one
behind the other in a pool, in the keys' dtype. A bitmap says at which keys the channel fired, in words of 32 keys; the
first key has no bit. So key t of channel c is value number popcount(bits of c up to t) of the list: no key depends on
another, and an element costs one load.
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
def word_of(bits, starts, record, w, column, D: tl.constexpr):
    """Word w of a record's bitmap, and in the upper half where the lists go on with it, for the channels `column`.

    `bits` is [records, D, 4], `starts` [records, D]: where the lists begin in the record, in 16 bits. One thread loads
    a channel's whole bitmap and hands on one number. The gather, of every element from its own place, sees to that:
    without it each thread would work this out for every key that it unpacks, or exchange whole tiles of it.
    """
    u = tl.arange(0, WORDS)
    live = column < D
    at = bits + (record * D + column)[:, None] * WORDS + u[None, :]
    words = tl.load(at, mask=live[:, None], other=0).to(tl.uint32, bitcast=True)
    start = tl.load(starts + record * D + column, mask=live, other=0).to(tl.int32) & 0xFFFF
    start += tl.sum(tl.where((u < w)[None, :], popcount(words), 0), 1)
    word = tl.sum(tl.where((u == w)[None, :], words, 0), 1)
    both = (start.to(tl.int64) << 32) | word.to(tl.int64)
    return tl.gather(both, tl.arange(0, column.shape[0]), 0)


@triton.jit
def places(words, key):
    """[channels, 32]: where the values of a word's keys are in the record; `words` as `word_of` has them.

    `key` is any number that is 0 modulo 32. What LLVM knows of it, it knows of the bits below, and no longer sees that
    they are counted.
    """
    words = words[:, None]
    t = (key + tl.arange(0, WORD)) & 31
    up_to = tl.full([WORD], 0xFFFFFFFF, tl.uint32) >> (31 - t).to(tl.uint32)
    return (words >> 32).to(tl.int32) + popcount(words.to(tl.uint32) & up_to[None, :])


@triton.jit
def held_columns(values, bits, starts, record, w, key, first, D: tl.constexpr, BC: tl.constexpr):
    """[BC, 32]: the held keys of a word of a record, transposed, for channels from `first` on; `values` are the
    record's, in the pool, and `key` as `places` has it."""
    column = first + tl.arange(0, BC)
    at = values + places(word_of(bits, starts, record, w, column, D), key)
    if D % BC == 0:
        return tl.load(at)  # there is no channel beyond D
    else:
        return tl.load(at, mask=(column < D)[:, None], other=0)
