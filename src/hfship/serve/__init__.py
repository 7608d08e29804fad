# SPDX-License-Identifier: Apache-2.0
"""Facts, host and image to a container that answers."""
