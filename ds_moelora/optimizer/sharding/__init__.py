"""A preconditioned step on slices of flat partitions, exact wherever the boundaries fall.

    placement   where each parameter lies in the flat buffers: integer arithmetic
    plan        what a process does in one call: rows it owns whole, rows that a boundary cuts, the matrices it wants
    transfer    one collective: parts go to the processes that want their sum
    exchange    the call itself
    zero        where DeepSpeed put the parameters: the one module that reads its private attributes

One call is one `optimizer.step()`, or one parameter group's (sub-group's) part of it. A process wants the r x r
matrices of the experts of which it owns gradients, made of the partners' Gram matrices, and no others. Its phases, per
process group:

    0. Only for factors stored rank first (PEFT's lora_A) of which a boundary cuts an expert: these few experts are
       assembled, the weight where its Gram matrix is wanted, the gradient where it is owned.
    1. Local: every process sums the Gram matrices of the whole rows it owns.
    2. One collective (`transfer`): Gram matrices that another process wants or has parts of, and the rows that a
       boundary cuts, weight and gradient, each process giving its piece.
       (A row of PEFT's stacked lora_B, (out, r, E), has r elements of each expert.)
    3. Local: outer products of the cut rows complete the Gram matrices; one r x r matrix per wanted expert is made of
       each; every process multiplies the gradient rows it owns by them, in place, and its pieces of the cut rows.

On N processes a process sums and inverts about 1/N of all Gram matrices: those of its experts, and at ZeRO-3 at least
one of every factor. An exchange takes at most the bytes of an all-reduce of one triangle of every Gram matrix and of
the cut rows, 4 * (sum of E r (r + 1) / 2 over the factors + 2 r per cut row), whatever in and out.

What takes part in a collective follows from placements alone, which all processes share, never from values or from the
presence of a gradient: processes cannot disagree on whether a collective happens. Where nothing is shared (one process,
no ZeRO, boundaries between pairs) there is no communication. Float64 parameters double the bytes.
"""
