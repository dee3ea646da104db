"""Which transformers is installed: some tests say what holds of version 5 alone."""

import pytest
import transformers

IS_V4 = transformers.__version__.startswith("4.")
needs_v5 = pytest.mark.skipif(IS_V4, reason="transformers 4.57 itself does otherwise")
