"""Checks for what others write: environments, search backends and cost models.

    from ajpq.testing import check_backend

    def test_my_search():
        check_backend(MySearch)

Each raises AssertionError with a sentence that names what is wrong, and needs nothing: `small_problem()`, a network of
random weights on random images, is made where none is given.
"""

from ajpq.testing.backends import check_backend
from ajpq.testing.costs import check_cost_model
from ajpq.testing.environments import check_env
from ajpq.testing.problems import small_problem

__all__ = ["check_backend", "check_cost_model", "check_env", "small_problem"]
