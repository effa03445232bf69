"""One device's attention: functions of one signature, each stating what it supports."""

from .dense import dense_attention as dense_attention
