-- Deregister a replica that leaves. Where another process has the same id, it stays registered, and learns of it.
--
-- KEYS  for each namespace two: presence and registry, as in echo.lua
-- ARGV  replica, token of this life of the replica
--       for each namespace the lives of other processes that are known to have this id, separated by commas
--
-- Returns how many registrations were removed.

local replica, life, removed = ARGV[1], ARGV[2], 0
for i = 1, #KEYS, 2 do
  -- Reads the presence with a right that every replica has.
  local presence = redis.pcall('SET', KEYS[i], '', 'XX', 'KEEPTTL', 'GET')
  if type(presence) ~= 'string' then
    presence = ''
  end
  local others, left = {}, presence:match('"left":"([%w,]*)"') or ''
  for other in (ARGV[2 + (i + 1) / 2] .. ',' .. (presence:match('"life":"(%w+)"') or '')):gmatch('%w+') do
    others[other] = true
  end
  for other in (left .. ',' .. life):gmatch('%w+') do
    others[other] = nil
  end
  if next(others) and presence ~= '' then
    left = left == '' and life or (left .. ',' .. life)
    presence = presence:gsub(',"left":"[%w,]*"', ''):gsub('}$', ',"left":"' .. left .. '"}')
    redis.call('SET', KEYS[i], presence, 'XX', 'KEEPTTL')
  else
    redis.call('DEL', KEYS[i])
    removed = removed + redis.call('ZREM', KEYS[i + 1], replica)
  end
end
return removed
