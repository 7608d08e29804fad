# SPDX-License-Identifier: Apache-2.0
"""What every floor stands on."""
