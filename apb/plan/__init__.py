"""Plans: who holds, computes, sends and keeps what, as data; bytes, FLOPs and memory as functions of it."""
