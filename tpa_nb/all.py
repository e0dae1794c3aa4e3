"Everything that the package offers, for notebooks and interactive use: `from tpa_nb.all import *`"
from .arch import *
from .families import *
from .tasks import *
from .importance import *
from .prune import *
from .lora import *
from .train import *
from .profile import *
from .save import *
from .hardware import *
from .checks import *
from .text import *
from .budget import *
from .ffn import *
from .report import *
from .compress import *
from .runner import *
