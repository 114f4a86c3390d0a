import pytest
from blends import three_domains


@pytest.fixture
def pool(tmp_path):
    return three_domains(tmp_path / "pool")
