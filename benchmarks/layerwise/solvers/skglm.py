"""The Lasso of skglm, row by row."""

from benchmark_utils.regression import LassoByRows
from skglm import Lasso


class Solver(LassoByRows):
    """Working sets with Anderson acceleration (arXiv 2204.07826), with its own settings."""

    name = "skglm"
    requirements = ["pip::skglm"]

    def warm_up(self) -> None:
        """Compile, which is not timed."""
        Lasso(self.strength, fit_intercept=False).fit(self.inputs, self.outputs[:, 0])

    def run(self, _: object) -> None:
        """Fit every row."""
        model = Lasso(self.strength, fit_intercept=False)
        self.rows = [model.fit(self.inputs, row).coef_ for row in self.outputs.T]
