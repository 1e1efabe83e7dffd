"""A preconditioned step on slices of flat partitions, exact wherever the boundaries fall.

    placement   where each parameter lies in the flat buffers: integer arithmetic
    plan        what a process does in one call: rows it owns whole, rows that a boundary cuts, offsets in the buffer
    exchange    the call itself
    zero        where DeepSpeed put the parameters: the one module that reads its private attributes

One call is one `optimizer.step()`, or one parameter group's (sub-group's) part of it. Its phases, per process group:

    0. Only for factors stored rank first (PEFT's lora_A) that a boundary cuts: one all-reduce assembles weight and
       gradient of these few factors in every process; of a stack of experts, only of the experts that are cut.
                                                                      8 bytes per element of each such factor or expert
    1. Local: every process sums the Gram matrices of the whole rows it owns.
    2. One all-reduce of a zero-filled buffer: all Gram matrices, and the rows that a boundary cuts, weight and
       gradient, each process filling in its piece.
                                       4 * (sum of E r^2 over the factors + 2 r per cut row) bytes, whatever in and out
       (A row of PEFT's stacked lora_B, (out, r, E), has r E elements, of all experts.)
    3. Local: outer products of the cut rows complete the Gram matrices; one r x r matrix per expert is made of each;
       every process multiplies the gradient rows it owns by them, in place, and its pieces of the cut rows.

What takes part in a collective follows from placements alone, which all processes share, never from values or from the
presence of a gradient: processes cannot disagree on whether a collective happens. Where nothing is partitioned (one
process, no ZeRO) there is no communication. Float64 parameters double the bytes.
"""
