"""Each rank sends its chunk to every other rank itself."""

import numpy as np

MESSAGE = "in a ring each rank sends to the next only"


def ring_all_gather(comm, chunk):
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    sendings = [comm.isend(chunk, rank) for rank in others]
    chunks = {comm.rank: chunk, **{rank: comm.recv(rank) for rank in others}}
    for sending in sendings:
        sending.wait()
    return np.concatenate([chunks[rank] for rank in range(comm.size)])
