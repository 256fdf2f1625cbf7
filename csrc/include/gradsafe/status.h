// Readable text for a launcher's status.
#pragma once

#include <string>

#include "gradsafe/types.h"

namespace gradsafe {

std::string status_text(int code, int cuda);

}  // namespace gradsafe
