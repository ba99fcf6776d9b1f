"""The search for Pareto-optimal training solutions: FasTrCaps as a whole (section III, figure 3).

The user names a network, a data set and what matters; trials are training runs, compared by their best accuracy on the
validation split, their training seconds and their parameters. The test set plays no part in it. Trials come from
Optuna's multi-objective sampler (a :class:`Space`) or from a fixed list (:class:`Row`), are kept in Optuna's storage,
and may be shared by any number of worker processes on any number of machines:

    exploration = Exploration(Space("capsnet_tiny", data, epochs=10), options, data, folder="runs/explore")
    exploration.run(budget=600)
    for solution in exploration.front():
        print(solution.accuracy, solution.seconds, solution.parameters, solution.options)

Paper: "FasTrCaps: An Integrated Framework for Fast yet Accurate Training of Capsule Networks",
https://arxiv.org/abs/1905.10142.
"""

from .caution import cautions
from .exploration import Exploration
from .grid import Row, compare
from .results import write_solutions
from .solution import OBJECTIVES, ExplorationError, Solution, choose, pareto_front
from .space import POLICIES, Space
from .timing import CLOCKS, retime, seconds_of_an_epoch

__all__ = [
    "CLOCKS",
    "Exploration",
    "ExplorationError",
    "OBJECTIVES",
    "POLICIES",
    "Row",
    "Solution",
    "Space",
    "cautions",
    "choose",
    "compare",
    "pareto_front",
    "retime",
    "seconds_of_an_epoch",
    "write_solutions",
]
