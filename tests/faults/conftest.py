from tests.train.runs import new_run

__all__ = ["new_run"]
