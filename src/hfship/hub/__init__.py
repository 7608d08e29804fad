# SPDX-License-Identifier: Apache-2.0
"""From the Hub to a folder."""
