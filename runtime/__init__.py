"""The third stage: done. Builds what the plan says, with the values that the eager constructor gives, and decides nothing.

* `materialize`: the verb, a second and real run of the constructor, guided by the tape;
* `guided`: the dispatch mode of that run: dead fills are left out, the others may wait;
* `waiting`: storages that stay empty until something reads them;
* `steps`: the plan's casts and moves, done by calling `module.to`;
* `state`: some tensors only, from their recipes;
* `check`: what must hold at the end.
"""

from .materialize import Build, materialize
from .state import materialize_state

__all__ = ["Build", "materialize", "materialize_state"]
