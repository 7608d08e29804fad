# SPDX-License-Identifier: Apache-2.0
"""A folder to NAME.tar.zst and back."""
