"""The Lasso of scikit-learn, row by row."""

from benchmark_utils.regression import LassoByRows
from sklearn.linear_model import Lasso


class Solver(LassoByRows):
    """Coordinate descent with its own settings (a duality gap of 1e-4 of |y|^2, at most 1000 passes)."""

    name = "scikit-learn"
    requirements = ["pip::scikit-learn"]

    def run(self, _: object) -> None:
        """Fit every row."""
        model = Lasso(self.strength, fit_intercept=False, precompute=True)
        self.rows = model.fit(self.inputs, self.outputs).coef_
