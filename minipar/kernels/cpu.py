from minipar.kernels.plain import *  # noqa
