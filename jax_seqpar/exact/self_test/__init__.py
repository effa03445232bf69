"""The self-test of a backend's arithmetic: questions, their answers by integers, a certificate."""

from .certificate import Certificate as Certificate
from .certificate import certify as certify
