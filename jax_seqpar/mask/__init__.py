"""What an attention computes, apart from how: the mask, the logits, the dropout, in one value.

Everything is in the coordinates of the whole sequence. Nothing here knows a kernel or a mesh.
"""

from .attention_function import AttentionFunction as AttentionFunction
from .attention_function import keyword_form as keyword_form
from .dropout import Dropout as Dropout
from .logits import Logits as Logits
from .logits import accumulated as accumulated
from .mask import Mask as Mask
from .mask import PerToken as PerToken
from .mask import Window as Window
from .spec import Spec as Spec
from .spec import Terms as Terms
from .threefry import head_keys as head_keys
from .tokens import AnyTokens as AnyTokens
from .tokens import TokenList as TokenList
from .tokens import Tokens as Tokens
