"""Checkpoints that survive: written by all ranks, whole or not at all, loadable on any layout.

    path = save(Path("checkpoints"), step, comm, strategy, optimizer, config=…, layout=…, scalars=…, keep=3)
    manifest = open_checkpoint(newest(Path("checkpoints")), comm)      # every file's sum is checked
    load(path, manifest, comm, strategy, optimizer)                    # on any (dp, pp, tp, ZeRO, ranks)

A checkpoint is a directory of safetensors files and a manifest. Tensors are stored under their serial names
as boxes of the serial tensor, so that who wrote them does not matter to who reads them. For a training job's
checkpoints see `minipar.resume`. Files here, each importing only from those before it: manifest, shard_file,
folder, write, read.
"""

from minipar.checkpoint.folder import checkpoints, newest
from minipar.checkpoint.manifest import BUFFER, PARAMETER, Manifest, read_manifest
from minipar.checkpoint.read import Reader, load, open_checkpoint
from minipar.checkpoint.write import SaveFailed, as_plain, save
