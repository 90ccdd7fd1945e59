"""Pictures, drawn with matplotlib, readable in print and without colour vision.

    figure      what all share
    curves      losses, scaling over ranks, communication fits
    pipeline    timelines of a pipeline, predicted above measured
    partition   parameters laid over devices
    planning    memory by kind, layouts compared
    precision   sizes of numbers over float16's range
"""

from minipar.plot.curves import communication_fit, loss_curves, scaling_curve
from minipar.plot.figure import COLOURS, new_figure, smoothed
from minipar.plot.partition import partition_bars
from minipar.plot.pipeline import gantt, gantt_pair
from minipar.plot.planning import memory_bars, plan_comparison
from minipar.plot.precision import precision_histograms
