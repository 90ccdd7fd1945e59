"""The engine's mesh makes the groups."""

import minipar

MESSAGE = "minipar.Mesh is not to be used in this exercise"


def axes(comm, dp, pp, tp):
    mesh = minipar.Mesh(comm, dp=dp, pp=pp, tp=tp)
    return mesh.dp, mesh.pp, mesh.tp
