"""Spec of an attention, in one value: the mask, the logits and the dropout.

Everything is in the coordinates of the whole sequence, independent of kernels and meshes.
"""

from .attention_spec import Spec as Spec
from .attention_spec import Terms as Terms
from .dropout import Dropout as Dropout
from .keyword_form import AttentionFunction as AttentionFunction
from .keyword_form import keyword_form as keyword_form
from .logits import Logits as Logits
from .logits import accumulated as accumulated
from .mask import Mask as Mask
from .mask import PerToken as PerToken
from .mask import Window as Window
from .threefry import head_keys as head_keys
from .token_numbers import AnyTokens as AnyTokens
from .token_numbers import TokenList as TokenList
from .token_numbers import Tokens as Tokens
