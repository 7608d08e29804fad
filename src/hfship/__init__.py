# SPDX-License-Identifier: Apache-2.0
"""hfship: carry Hugging Face models across an air gap and put them into service."""

__version__ = "0.1.0"
