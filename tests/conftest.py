import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

# Triton reads this when it is first imported, and some test's imports import it. With a GPU its kernels run there.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
