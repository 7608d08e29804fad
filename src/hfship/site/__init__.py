# SPDX-License-Identifier: Apache-2.0
"""Many models behind one address: gateway, keys, monitoring."""
