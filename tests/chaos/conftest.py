"""The control plane and the played API users of the component tests."""

from tests.component.conftest import api, cluster, module_operator, operator

__all__ = ["api", "cluster", "module_operator", "operator"]
