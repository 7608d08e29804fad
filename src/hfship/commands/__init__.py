# SPDX-License-Identifier: Apache-2.0
"""Words that an operator types."""
