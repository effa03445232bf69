"""One device's attention: functions of one signature, each stating what it supports."""

from .blockwise import blockwise_attention as blockwise_attention
from .dense import dense_attention as dense_attention
