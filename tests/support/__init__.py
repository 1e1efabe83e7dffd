"""What several tests share: a pool of ranks, and models in which every boundary is unaligned."""
