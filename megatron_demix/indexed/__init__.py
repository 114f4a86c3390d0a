"""Megatron's .bin/.idx format: read, validate, write, views. Knows token sequences and documents, no domains.

An indexed data set is two files with one prefix. `.bin`: token ids, end to end. `.idx`, all little-endian:

    bytes 0-8    b"MMIDIDX\\0\\0"
    bytes 9-16   uint64 version, 1
    byte  17     uint8 dtype code (format.DTYPES)
    bytes 18-25  uint64 number of sequences S
    bytes 26-33  uint64 number of document boundaries B = documents + 1
    int32[S]     tokens of each sequence
    int64[S]     byte in the .bin where each sequence begins
    int64[B]     index of each document's first sequence; the last entry is S
    int8[S]      modes, only in multimodal data

Pointers may repeat and come in any order: an .idx that does so is a *view* of its .bin.
"""
